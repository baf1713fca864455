// The parts of a layer: linear maps of packed weights, norms, activations, rotation, attention of one query.
//
// Weights are packed into panels of PANEL outputs, [outputs / PANEL][inputs][PANEL], with zeros behind the last output. All is
// float32; sums are vectorized, so their order is not that of torch. `../panels.py` and `../layers.py` have the same structures.

#pragma once

#include <vector>

#include <omp.h>

#include "exponential.h"

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, MOST_ROWS = 8;  // 16 accumulators of 32 registers
#else
constexpr int LANES = 8, MOST_ROWS = 6;  // 12 accumulators of 16 registers
#endif
constexpr int64_t PANEL = 2 * LANES;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

struct Map {
    const float *panels, *bias;
    int64_t inputs, outputs;
};

enum NormKind : int64_t { NO_NORM, LAYER_NORM, RMS_NORM };

struct Norm {
    const float *weight, *bias;
    double eps;
    int64_t kind;
};

struct Attention {
    Norm norm;
    Map in, out;  // in: queries, keys and values; of the source queries only
    int64_t heads, key_heads;  // heads = 0: there is none
};

enum Activation : int64_t { RELU, GELU, GELU_TANH, SILU, TANH, LINEAR };

struct FeedForward {
    Norm norm;
    Map in, out;
    int64_t activation, gated;  // gated: `in` gives up, then gate
};

struct Layer {
    Attention own, source;
    FeedForward feed_forward;
    int64_t head_dim, pre_norm;
};

inline int64_t whole_panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL * PANEL; }

template <int ROWS>
void multiply(const float *x, int64_t x_step, const float *panel, const float *bias, int64_t inputs, bool add, float *y, int64_t y_step) {
    Vector sums[ROWS][2] = {};
    for (int64_t i = 0; i < inputs; i++, panel += PANEL)
        for (int row = 0; row < ROWS; row++)
            for (int half = 0; half < 2; half++) sums[row][half] += x[row * x_step + i] * *(const Vector *)(panel + half * LANES);
    for (int row = 0; row < ROWS; row++)
        for (int half = 0; half < 2; half++) {
            Vector *to = (Vector *)(y + row * y_step + half * LANES);
            // What is added comes last: a large number at the start would round every partial sum.
            Vector total = sums[row][half] + *(const Vector *)(bias + half * LANES);
            *to = add ? *to + total : total;
        }
}

template <int ROWS>
void multiply_rest(int64_t rows, const float *x, int64_t x_step, const float *panel, const float *bias, int64_t inputs, bool add,
                   float *y, int64_t y_step) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return multiply<ROWS>(x, x_step, panel, bias, inputs, add, y, y_step);
        multiply_rest<ROWS - 1>(rows, x, x_step, panel, bias, inputs, add, y, y_step);
    }
}

// y (rows, whole panels) = x W^T + bias, or that added to y. The outputs of panels from `first` to `last`.
inline void apply(const Map &map, int64_t rows, const float *x, int64_t x_step, bool add, float *y, int64_t y_step, int64_t first, int64_t last) {
    for (; first < last; first += PANEL)
        for (int64_t row = 0; row < rows; row += MOST_ROWS)
            multiply_rest<MOST_ROWS>(std::min<int64_t>(rows - row, MOST_ROWS), x + row * x_step, x_step, map.panels + first * map.inputs,
                                     map.bias + first, map.inputs, add, y + row * y_step + first, y_step);
}

// y = norm(x) of a row, which may be x itself.
inline void normalize(const Norm &norm, const float *x, float *y, int64_t size) {
    if (norm.kind == NO_NORM) {
        if (x != y) std::memcpy(y, x, size * sizeof(float));
        return;
    }
    float mean = 0, squares = 0;
    if (norm.kind == LAYER_NORM) {
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < size; i++) mean += x[i];
        mean /= size;
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; i++) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / std::sqrt(squares / size + (float)norm.eps);
    for (int64_t i = 0; i < size; i++) y[i] = (x[i] - mean) * scale * norm.weight[i];
    if (norm.bias)
        for (int64_t i = 0; i < size; i++) y[i] += norm.bias[i];
}

inline float tangent(float x) {  // hyperbolic
    float magnitude = std::fabs(x), decay = exponential(-2 * magnitude);
    return std::copysign((1 - decay) / (1 + decay), x);
}

inline void activate(int64_t kind, float *x, int64_t size) {
    switch (kind) {
        case RELU:
            for (int64_t i = 0; i < size; i++) x[i] = x[i] < 0 ? 0 : x[i];
            break;
        case GELU:
            for (int64_t i = 0; i < size; i++) x[i] *= 0.5f * (1 + std::erf(x[i] * 0.70710678f));
            break;
        case GELU_TANH:
            for (int64_t i = 0; i < size; i++) x[i] *= 0.5f * (1 + tangent(0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
            break;
        case SILU:
            for (int64_t i = 0; i < size; i++) x[i] /= 1 + exponential(-x[i]);
            break;
        case TANH:
            for (int64_t i = 0; i < size; i++) x[i] = tangent(x[i]);
            break;
        default:
            break;
    }
}

// The rotation of `heads` heads in place.
inline void rotate(float *x, int64_t heads, int64_t head_dim, const float *cos, const float *sin, int64_t pairs, bool interleaved) {
    int64_t between = interleaved ? 1 : pairs, next = interleaved ? 2 : 1;
    for (int64_t head = 0; head < heads; head++, x += head_dim)
        for (int64_t pair = 0; pair < pairs; pair++) {
            float *first = x + pair * next, *second = first + between, value = *first;
            *first = value * cos[pair] - *second * sin[pair];
            *second = *second * cos[pair] + value * sin[pair];
        }
}

// The sum of a vector of SIZE floats, in halves.
template <int SIZE, typename Whole>
inline float sum(const Whole &x) {
    if constexpr (SIZE == 2) {
        return x[0] + x[1];
    } else {
        typedef float Half __attribute__((vector_size(SIZE / 2 * sizeof(float))));
        Half parts[2];
        std::memcpy(parts, &x, sizeof(parts));
        return sum<SIZE / 2>(parts[0] + parts[1]);
    }
}

// Where the heads of keys and values are: steps from one head and position to the next.
struct Layout {
    int64_t of_head, of_position;
};

// scores[s] = query . keys[s] * scale + bias[s], of DIM vectors a head; DIM = 0: of any size.
template <int DIM>
void score(const float *query, const float *keys, int64_t of_position, int64_t length, const float *bias, float *scores, int64_t head_dim) {
    float scale = 1 / std::sqrt((float)head_dim);
    for (int64_t s = 0; s < length; s++, keys += of_position) {
        float product = 0;
        if constexpr (DIM > 0) {
            Vector products = *(const Vector *)query * *(const Vector *)keys;
            for (int i = 1; i < DIM; i++) products += *(const Vector *)(query + i * LANES) * *(const Vector *)(keys + i * LANES);
            product = sum<LANES>(products);
        } else {
            for (int64_t i = 0; i < head_dim; i++) product += query[i] * keys[i];
        }
        scores[s] = product * scale + bias[s];
    }
}

template <int DIM>
void mix(const float *weights, float total, const float *values, int64_t of_position, int64_t length, float *mixed, int64_t head_dim) {
    if constexpr (DIM > 0) {
        Vector sums[DIM] = {};
        for (int64_t s = 0; s < length; s++, values += of_position)
            for (int i = 0; i < DIM; i++) sums[i] += weights[s] * *(const Vector *)(values + i * LANES);
        for (int i = 0; i < DIM; i++) *(Vector *)(mixed + i * LANES) = sums[i] / total;
    } else {
        std::fill(mixed, mixed + head_dim, 0.0f);
        for (int64_t s = 0; s < length; s++, values += of_position)
            for (int64_t i = 0; i < head_dim; i++) mixed[i] += weights[s] * values[i];
        for (int64_t i = 0; i < head_dim; i++) mixed[i] /= total;
    }
}

template <int DIM>
void attend_head(const float *query, float *mixed, int64_t head_dim, const float *keys, const float *values, int64_t of_position,
                 int64_t length, const float *bias, float *scores) {
    score<DIM>(query, keys, of_position, length, bias, scores, head_dim);
    float most = scores[0], total = 0;
    for (int64_t s = 1; s < length; s++) most = scores[s] > most ? scores[s] : most;
#pragma omp simd reduction(+ : total)
    for (int64_t s = 0; s < length; s++) total += scores[s] = exponential(scores[s] - most);
    mix<DIM>(scores, total, values, of_position, length, mixed, head_dim);
}

// Each head of queries of a row over `length` keys. query, mixed: (heads, head_dim). bias: of the row; of_key_head, of_query: steps
// from one head of keys to the next, and between the heads of queries that share it.
inline void attend(const float *query, float *mixed, const Attention &part, int64_t head_dim, const float *keys, const float *values,
            const Layout &layout, int64_t length, const float *bias, int64_t of_key_head, int64_t of_query, float *scores) {
    int64_t queries = part.heads / part.key_heads;
    auto run = attend_head<0>;
    switch (head_dim) {
        case LANES: run = attend_head<1>; break;
        case 2 * LANES: run = attend_head<2>; break;
        case 4 * LANES: run = attend_head<4>; break;
        case 8 * LANES: run = attend_head<8>; break;
    }
    for (int64_t head = 0; head < part.heads; head++, query += head_dim, mixed += head_dim) {
        int64_t key_head = head / queries, start = key_head * layout.of_head;
        run(query, mixed, head_dim, keys + start, values + start, layout.of_position, length,
            bias + key_head * of_key_head + head % queries * of_query, scores);
    }
}

// Threads that compute a block of rows together: each a part of the outputs of a map, and of the rows elsewhere.
struct Team {
    int64_t rank = 0, size = 1;

    void wait() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
};

// Whether so few rows make a team of threads worthwhile: a barrier takes about as long as 50,000 products.
inline bool worth_a_team(const Layer &layer, int64_t rows, int64_t threads) {
    return threads > 1 && rows * layer.own.out.inputs * layer.own.out.outputs / threads >= 50000;
}

// What passes between the parts of a layer, of one block of rows.
struct Block {
    int64_t rows, model_dim, hidden_step, wide_step, mixed_step, scores_step;
    float *hidden, *normed, *wide, *mixed, *scores;
    std::vector<float> memory;

    Block(const Layer *const *layers, int64_t depth, int64_t model_dim, int64_t rows, int64_t most_keys, int64_t team_size)
        : rows(rows), model_dim(model_dim), hidden_step(whole_panels(model_dim)), wide_step(0), mixed_step(0), scores_step(most_keys) {
        for (int64_t at = 0; at < depth; at++) {
            const Layer &layer = *layers[at];
            for (const Map *map : {&layer.own.in, &layer.source.in, &layer.feed_forward.in})
                wide_step = std::max(wide_step, whole_panels(map->outputs));
            mixed_step = std::max({mixed_step, layer.own.heads * layer.head_dim, layer.source.heads * layer.head_dim});
        }
        memory.resize(rows * (2 * hidden_step + wide_step + mixed_step) + team_size * scores_step);
        hidden = memory.data();
        normed = hidden + rows * hidden_step;
        wide = normed + rows * hidden_step;
        mixed = wide + rows * wide_step;
        scores = mixed + rows * mixed_step;
    }

    // The rows of x (rows, model_dim) into `hidden`, and back.
    void enter(const float *x, const Team &team) {
        for (int64_t row = team.rank; row < rows; row += team.size)
            std::memcpy(hidden + row * hidden_step, x + row * model_dim, model_dim * sizeof(float));
        team.wait();
    }

    void leave(float *x, const Team &team) const {
        for (int64_t row = team.rank; row < rows; row += team.size)
            std::memcpy(x + row * model_dim, hidden + row * hidden_step, model_dim * sizeof(float));
    }

    void normalize_rows(const Norm &norm, float *to, const Team &team) {
        for (int64_t row = team.rank; row < rows; row += team.size)
            normalize(norm, hidden + row * hidden_step, to + row * hidden_step, model_dim);
        team.wait();
    }

    void apply_part(const Map &map, const float *x, int64_t x_step, bool add, float *y, int64_t y_step, const Team &team) const {
        int64_t part = whole_panels((map.outputs + team.size - 1) / team.size), first = team.rank * part;
        apply(map, rows, x, x_step, add, y, y_step, first, std::min(first + part, map.outputs));
        team.wait();
    }
};

// Between the maps of the network.
inline void feed_forward(const FeedForward &network, Block &my, const Team &team) {
    int64_t size = network.out.inputs;
    for (int64_t row = team.rank; row < my.rows; row += team.size) {
        float *up = my.wide + row * my.wide_step, *gate = up + size;
        activate(network.activation, network.gated ? gate : up, size);
        if (network.gated)
            for (int64_t i = 0; i < size; i++) up[i] *= gate[i];
    }
}

// A sublayer between its residual connection and norm. middle: from `wide` to `result`, the team's rows.
template <typename Middle>
void sublayer(const Norm &norm, bool pre_norm, const Map &in, const Map &out, Block &my, const Team &team, const float *result,
              int64_t result_step, Middle middle) {
    if (pre_norm) my.normalize_rows(norm, my.normed, team);
    my.apply_part(in, pre_norm ? my.normed : my.hidden, my.hidden_step, false, my.wide, my.wide_step, team);
    middle();
    team.wait();
    my.apply_part(out, result, result_step, true, my.hidden, my.hidden_step, team);
    if (!pre_norm) my.normalize_rows(norm, my.hidden, team);
}

}  // namespace
