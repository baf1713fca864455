// Whole sentences through the layers of an encoder, in one call: a thread, or a team of them, takes one sentence through all layers.

#include "layers.h"

namespace {

struct Bias {  // added to the scores; steps from one sentence, head and query to the next
    const float *values;
    int64_t of_sentence, of_head, of_query;
};

struct Batch {
    int64_t sentences, length, model_dim, causal;  // causal: token t sees tokens 0..t
    Bias bias;
    const float *cos, *sin;  // (sentences or 1, length, pairs); pairs = 0: nothing is rotated
    int64_t pairs, of_sentence, interleaved;
};

void self_attention(const Layer &layer, const Batch &batch, int64_t sentence, Block &my, const Team &team) {
    const Attention &own = layer.own;
    int64_t of_queries = own.heads * layer.head_dim, of_keys = own.key_heads * layer.head_dim, queries = own.heads / own.key_heads;
    for (int64_t row = team.rank; row < batch.length && batch.pairs; row += team.size) {
        int64_t at = sentence * batch.of_sentence + row * batch.pairs;
        rotate(my.wide + row * my.wide_step, own.heads + own.key_heads, layer.head_dim, batch.cos + at, batch.sin + at, batch.pairs,
               batch.interleaved);
    }
    team.wait();  // a row reads the keys of all
    const float *keys = my.wide + of_queries, *bias = batch.bias.values + sentence * batch.bias.of_sentence;
    for (int64_t row = team.rank; row < batch.length; row += team.size)
        attend(my.wide + row * my.wide_step, my.mixed + row * my.mixed_step, own, layer.head_dim, keys, keys + of_keys,
               {layer.head_dim, my.wide_step}, batch.causal ? row + 1 : batch.length, bias + row * batch.bias.of_query,
               queries * batch.bias.of_head, batch.bias.of_head, my.scores + team.rank * my.scores_step);
}

void run_sentence(const Layer *const *layers, int64_t depth, const Batch &batch, float *x, int64_t sentence, Block &my, const Team &team) {
    float *rows = x + sentence * batch.length * batch.model_dim;
    my.enter(rows, team);
    for (int64_t at = 0; at < depth; at++) {
        const Layer &layer = *layers[at];
        sublayer(layer.own.norm, layer.pre_norm, layer.own.in, layer.own.out, my, team, my.mixed, my.mixed_step,
                 [&] { self_attention(layer, batch, sentence, my, team); });
        const FeedForward &network = layer.feed_forward;
        sublayer(network.norm, layer.pre_norm, network.in, network.out, my, team, my.wide, my.wide_step,
                 [&] { feed_forward(network, my, team); });
    }
    my.leave(rows, team);
}

}  // namespace

extern "C" {

// x: (sentences, length, model_dim), in place. layers: by depth.
void encode_layers(const Layer *const *layers, int64_t depth, const Batch *batch, float *x, int64_t threads) {
    int64_t length = batch->length, size = batch->model_dim;
    if (batch->sentences < threads && worth_a_team(*layers[0], length, threads)) {
        Block block(layers, depth, size, length, length, threads);
        for (int64_t sentence = 0; sentence < batch->sentences; sentence++) {
#pragma omp parallel num_threads(threads)
            run_sentence(layers, depth, *batch, x, sentence, block, {omp_get_thread_num(), omp_get_num_threads()});
        }
        return;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && batch->sentences > 1)
    for (int64_t sentence = 0; sentence < batch->sentences; sentence++) {
        Block block(layers, depth, size, length, length, 1);
        run_sentence(layers, depth, *batch, x, sentence, block, {});
    }
}
}
