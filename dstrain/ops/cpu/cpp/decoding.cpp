// One new token a row through the layers of a decoder, in one call. `../decoding_layers.py` has the same structures.
//
// Rows do not depend on one another, so a thread takes a block of them through all layers: what passes between the parts of a
// layer stays in its cache, and there is one call where torch has some fifteen a layer, each of a few microseconds.

#include "layers.h"

namespace {

constexpr int64_t BLOCK = 64;  // rows of a thread: enough to read a panel from memory once for many, few enough for its cache

struct Keys {  // of one depth; steps from one row, head and position to the next
    float *keys, *values;
    int64_t of_row, of_head, of_position;
};

struct Bias {  // added to scores; steps from one head of keys of a row to the next, and between the heads of queries that share it
    const float *values;
    int64_t of_key_head, of_query;
};

struct Step {
    int64_t rows, model_dim, rows_per_sentence;
    int64_t position;  // of the new token: so many keys are in the cache already
    int64_t source_length;
    Bias bias, source_bias;
    const float *cos, *sin;  // (rows or 1, pairs); pairs = 0: nothing is rotated
    int64_t pairs, of_row, interleaved;
};

void self_attention(const Layer &layer, const Step &step, const Keys &cache, int64_t first, Block &my, const Team &team) {
    const Attention &own = layer.own;
    int64_t size = own.key_heads * layer.head_dim;
    for (int64_t row = team.rank; row < my.rows; row += team.size) {
        float *query = my.wide + row * my.wide_step, *key = query + own.heads * layer.head_dim, *value = key + size;
        if (step.pairs) {
            const float *cos = step.cos + (first + row) * step.of_row, *sin = step.sin + (first + row) * step.of_row;
            rotate(query, own.heads, layer.head_dim, cos, sin, step.pairs, step.interleaved);
            rotate(key, own.key_heads, layer.head_dim, cos, sin, step.pairs, step.interleaved);
        }
        float *keys = cache.keys + (first + row) * cache.of_row, *values = cache.values + (first + row) * cache.of_row;
        for (int64_t head = 0; head < own.key_heads; head++) {
            int64_t to = head * cache.of_head + step.position * cache.of_position;
            std::memcpy(keys + to, key + head * layer.head_dim, layer.head_dim * sizeof(float));
            std::memcpy(values + to, value + head * layer.head_dim, layer.head_dim * sizeof(float));
        }
        attend(query, my.mixed + row * my.mixed_step, own, layer.head_dim, keys, values, {cache.of_head, cache.of_position},
               step.position + 1, step.bias.values + (first + row) * own.key_heads * step.bias.of_key_head, step.bias.of_key_head,
               step.bias.of_query, my.scores + team.rank * my.scores_step);
    }
}

void source_attention(const Layer &layer, const Step &step, const Keys &source, int64_t first, Block &my, const Team &team) {
    const Attention &to = layer.source;
    for (int64_t row = team.rank; row < my.rows; row += team.size) {
        int64_t sentence = (first + row) / step.rows_per_sentence;
        attend(my.wide + row * my.wide_step, my.mixed + row * my.mixed_step, to, layer.head_dim,
               source.keys + sentence * source.of_row, source.values + sentence * source.of_row, {source.of_head, source.of_position},
               step.source_length, step.source_bias.values + sentence * to.key_heads * step.source_bias.of_key_head,
               step.source_bias.of_key_head, step.source_bias.of_query, my.scores + team.rank * my.scores_step);
    }
}

void run_block(const Layer *const *layers, int64_t depth, const Step &step, const Keys *cache, const Keys *source, float *x,
               int64_t first, Block &my, const Team &team) {
    my.enter(x + first * step.model_dim, team);
    for (int64_t at = 0; at < depth; at++) {
        const Layer &layer = *layers[at];
        sublayer(layer.own.norm, layer.pre_norm, layer.own.in, layer.own.out, my, team, my.mixed, my.mixed_step,
                 [&] { self_attention(layer, step, cache[at], first, my, team); });
        if (layer.source.heads)
            sublayer(layer.source.norm, layer.pre_norm, layer.source.in, layer.source.out, my, team, my.mixed, my.mixed_step,
                     [&] { source_attention(layer, step, source[at], first, my, team); });
        const FeedForward &network = layer.feed_forward;
        sublayer(network.norm, layer.pre_norm, network.in, network.out, my, team, my.wide, my.wide_step,
                 [&] { feed_forward(network, my, team); });
    }
    my.leave(x + first * step.model_dim, team);
}

}  // namespace

extern "C" {

// x: (rows, model_dim), in place. layers, cache, source: by depth.
void decode_layers(const Layer *const *layers, int64_t depth, const Step *step, const Keys *cache, const Keys *source, float *x,
                   int64_t threads) {
    int64_t most_keys = std::max(step->position + 1, step->source_length), all = step->rows;
    if (all < threads * MOST_ROWS && worth_a_team(*layers[0], all, threads)) {
        Block block(layers, depth, step->model_dim, all, most_keys, threads);
#pragma omp parallel num_threads(threads)
        run_block(layers, depth, *step, cache, source, x, 0, block, {omp_get_thread_num(), omp_get_num_threads()});
        return;
    }
    int64_t blocks = (all + BLOCK - 1) / BLOCK;
    if (threads > 1) blocks = std::min((blocks + threads - 1) / threads * threads, (all + MOST_ROWS - 1) / MOST_ROWS);
    int64_t rows = (all + blocks - 1) / blocks;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (blocks > 1)
    for (int64_t first = 0; first < all; first += rows) {
        Block block(layers, depth, step->model_dim, std::min(rows, all - first), most_keys, 1);
        run_block(layers, depth, *step, cache, source, x, first, block, {});
    }
}
}
