// Attention of training, forward and backward: one head of a sentence after another. `../native_attention.py` has the same structures.
//
// Scores are kept transposed, (keys, queries), with zeros behind the last query up to a whole vector. So a softmax goes down the
// rows, for a vector of queries at a time, and no sum goes across a vector. All seven products have one form: elements of the
// left matrix, of any steps, times vectors of the right one; queries, and in backward the gradient of the output, are transposed.

#include "layers.h"

namespace {

struct Heads {  // steps from one sentence, head and position to the next; the elements of a head are adjacent
    float *values;
    int64_t of_sentence, of_head, of_position;
};

struct Bias {  // added to the scores; values = nullptr: none
    const float *values;
    int64_t of_sentence, of_head, of_query, of_key;
};

struct Problem {
    int64_t sentences, heads, queries, keys, head_dim, causal;  // causal: query t sees keys 0..t
    Heads query, key, value, mixed;                             // mixed: the output; in backward its gradient
    Heads query_grad, key_grad, value_grad;                     // of backward only, as is scores_grad
    Bias bias;
    float *probabilities, *scores_grad;  // (sentences, heads, keys, whole vectors of queries); scores_grad may be nullptr
};

typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

inline int64_t whole_vectors(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

inline Vector *at(float *x) { return (Vector *)x; }
inline const Vector *at(const float *x) { return (const Vector *)x; }

// `exponential` of numbers that are not above zero.
inline Vector exponentials(Vector x) {
    Vector within = x < -87.3f ? Vector{} - 87.3f : x;
    Vector whole = within * 1.44269504f + 12582912.0f - 12582912.0f;  // 1.5 * 2^23: rounds to integers
    Vector rest = within - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vector series = Vector{} + 1.98412698e-4f;
    for (float factor : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f}) series = series * rest + factor;
    Integers bits = (__builtin_convertvector(whole, Integers) + 127) << 23;
    Vector power;
    std::memcpy(&power, &bits, sizeof(power));
    return x < -87.3f ? Vector{} : series * power;
}

struct Left {  // of a product
    const float *values;
    int64_t of_row, of_term;
};

struct Rows {  // of whole vectors
    float *values;
    int64_t step;
};

struct Range {  // what a block of rows of a product is made of: terms, and columns
    int64_t first_term, last_term, first_column, last_column;
};

template <int ROWS, int COLUMNS>
void tile(const Left &left, const float *right, int64_t of_term, int64_t terms, float *result, int64_t of_row) {
    Vector sums[ROWS][COLUMNS] = {};
    const float *element = left.values;
    for (int64_t term = 0; term < terms; term++, element += left.of_term, right += of_term)
        for (int row = 0; row < ROWS; row++)
            for (int column = 0; column < COLUMNS; column++) sums[row][column] += element[row * left.of_row] * *at(right + column * LANES);
    for (int row = 0; row < ROWS; row++)
        for (int column = 0; column < COLUMNS; column++) *at(result + row * of_row + column * LANES) = sums[row][column];
}

template <int ROWS>
void tiles(int64_t rows, const Left &left, const Rows &right, const Range &range, const Rows &result) {
    if constexpr (ROWS > 0) {
        if (rows < ROWS) return tiles<ROWS - 1>(rows, left, right, range, result);
        Left from = {left.values + range.first_term * left.of_term, left.of_row, left.of_term};
        const float *start = right.values + range.first_term * right.step;
        int64_t terms = range.last_term - range.first_term, column = range.first_column;
        for (; column + PANEL <= range.last_column; column += PANEL)
            tile<ROWS, 2>(from, start + column, right.step, terms, result.values + column, result.step);
        if (column < range.last_column) tile<ROWS, 1>(from, start + column, right.step, terms, result.values + column, result.step);
    }
}

// result (rows, columns) = left (rows, terms) right (terms, columns). range: of the rows from one to another.
template <typename Select>
void multiply(int64_t rows, Left left, const Rows &right, Rows result, Select range) {
    for (int64_t row = 0; row < rows; row += MOST_ROWS) {
        int64_t count = std::min<int64_t>(MOST_ROWS, rows - row);
        tiles<MOST_ROWS>(count, left, right, range(row, row + count), result);
        left.values += count * left.of_row;
        result.values += count * result.step;
    }
}

#if defined(__GNUC__) && !defined(__clang__)
// One step of a transposition: exchanges the parts of DISTANCE rows and columns off the diagonal, in all blocks of twice that size.
template <int DISTANCE>
inline void exchange(Vector *rows) {
    if constexpr (DISTANCE > 0) {
        Integers low, high;
        for (int lane = 0; lane < LANES; lane++) {
            low[lane] = lane & DISTANCE ? LANES + lane - DISTANCE : lane;
            high[lane] = lane & DISTANCE ? LANES + lane : lane + DISTANCE;
        }
        for (int row = 0; row < LANES; row++)
            if (!(row & DISTANCE)) {
                Vector first = rows[row], second = rows[row + DISTANCE];
                rows[row] = __builtin_shuffle(first, second, low);
                rows[row + DISTANCE] = __builtin_shuffle(first, second, high);
            }
        exchange<DISTANCE / 2>(rows);
    }
}
#endif

// to (columns, whole vectors of rows) = from (rows, columns) transposed, times scale, with zeros behind the last row.
inline void transpose(const Rows &from, int64_t rows, int64_t columns, float scale, float *to) {
    int64_t step = whole_vectors(rows);
    for (int64_t row = 0; row < rows; row += LANES)
        for (int64_t column = 0; column < columns; column += LANES) {
            int64_t height = std::min<int64_t>(LANES, rows - row), width = std::min<int64_t>(LANES, columns - column);
            const float *block = from.values + row * from.step + column;
            float *result = to + column * step + row;
#if defined(__GNUC__) && !defined(__clang__)
            Vector lines[LANES];
            for (int i = 0; i < LANES; i++) lines[i] = i < height ? *at(block + i * from.step) * scale : Vector{};
            exchange<LANES / 2>(lines);
            for (int i = 0; i < LANES; i++)
                if (i < width) *at(result + i * step) = lines[i];
#else
            for (int64_t j = 0; j < width; j++)
                for (int64_t i = 0; i < LANES; i++) result[j * step + i] = i < height ? block[i * from.step + j] * scale : 0;
#endif
        }
}

struct Head {  // of one sentence
    int64_t queries, keys, size, whole_size, step;  // step: whole vectors of queries
    bool causal;

    int64_t seen(int64_t query) const { return causal ? std::min(keys, query) : keys; }  // keys, by queries before that one
    int64_t first(int64_t key) const { return causal ? std::min(queries, key) : 0; }     // query that sees that key

    // The products with the scores: of keys and queries, of queries and elements, of keys and elements.
    auto scores() const {
        return [this](int64_t from, int64_t) { return Range{0, size, first(from) / LANES * LANES, step}; };
    }
    auto of_queries() const {
        return [this](int64_t, int64_t to) { return Range{0, seen(to), 0, whole_size}; };
    }
    auto of_keys() const {
        return [this](int64_t from, int64_t) { return Range{first(from), queries, 0, whole_size}; };
    }
};

struct Buffers {
    float *transposed, *scores, *bias, *result, *right;
    const float *transposed_bias = nullptr;  // that `bias` holds
    std::vector<float> memory;

    Buffers(const Head &head) {
        int64_t of_elements = head.whole_size * head.step, of_scores = head.keys * head.step;
        int64_t of_rows = std::max(head.queries, head.keys) * head.whole_size;
        memory.resize(of_elements + 2 * of_scores + 2 * of_rows);
        transposed = memory.data();
        scores = transposed + of_elements;
        bias = scores + of_scores;
        result = bias + of_scores;
        right = result + of_rows;
    }
};

inline Rows rows_of(const Heads &heads, int64_t sentence, int64_t head) {
    return {heads.values + sentence * heads.of_sentence + head * heads.of_head, heads.of_position};
}

// Rows as they are if they are whole vectors; else their copy in `to`, with zeros behind.
inline Rows in_whole_vectors(const Head &head, const Rows &rows, int64_t count, float *to) {
    if (head.size == head.whole_size) return rows;
    for (int64_t row = 0; row < count; row++)
        for (int64_t i = 0; i < head.whole_size; i++) to[row * head.whole_size + i] = i < head.size ? rows.values[row * rows.step + i] : 0;
    return {to, head.whole_size};
}

// result = left right, of rows that may not be whole vectors.
template <typename Select>
void multiply_heads(const Head &head, int64_t rows, const Left &left, const Rows &right, int64_t terms, const Rows &result, Select range,
                    Buffers &my) {
    Rows factor = in_whole_vectors(head, right, terms, my.right);
    if (head.size == head.whole_size) return multiply(rows, left, factor, result, range);
    multiply(rows, left, factor, {my.result, head.whole_size}, range);
    for (int64_t row = 0; row < rows; row++)
        std::memcpy(result.values + row * result.step, my.result + row * head.whole_size, head.size * sizeof(float));
}

// The bias of a head by queries, as the scores; one for many heads is transposed once.
inline void transpose_bias(const Head &head, const Bias &bias, const float *values, Buffers &my) {
    if (values == my.transposed_bias) return;
    my.transposed_bias = values;
    for (int64_t query = 0; query < head.queries; query++)
        for (int64_t key = 0; key < head.keys; key++) my.bias[key * head.step + query] = values[query * bias.of_query + key * bias.of_key];
}

// Scores to probabilities, of a vector of queries from `query`. by_query: of_key is a row; else the bias of a key is one number.
inline void normalize(const Head &head, float *scores, int64_t query, const float *bias, int64_t of_key, bool by_query) {
    int64_t seen = head.seen(query + LANES), step = head.step;
    Vector most = Vector{} - INFINITY, total = {};
    Integers lanes;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
    for (int64_t key = 0; key < seen; key++) {
        Vector score = *at(scores + key * step);
        if (bias) score += by_query ? *at(bias + key * of_key) : Vector{} + bias[key * of_key];
        if (head.causal && key > query) score = lanes < (int32_t)(key - query) ? Vector{} - INFINITY : score;
        *at(scores + key * step) = score;
        most = score > most ? score : most;
    }
    for (int64_t key = 0; key < seen; key++) total += *at(scores + key * step) = exponentials(*at(scores + key * step) - most);
    total = 1 / total;
    for (int64_t key = 0; key < seen; key++) *at(scores + key * step) *= total;
    for (int64_t key = seen; key < head.keys; key++) *at(scores + key * step) = Vector{};
}

inline void forward_head(const Head &head, const Problem &problem, int64_t sentence, int64_t number, float *probabilities, Buffers &my) {
    Rows query = rows_of(problem.query, sentence, number), key = rows_of(problem.key, sentence, number);
    query = in_whole_vectors(head, query, head.queries, my.right);
    transpose(query, head.queries, head.size, 1 / std::sqrt((float)head.size), my.transposed);
    multiply(head.keys, {key.values, key.step, 1}, {my.transposed, head.step}, {probabilities, head.step}, head.scores());
    const Bias &bias = problem.bias;
    const float *added = bias.values ? bias.values + sentence * bias.of_sentence + number * bias.of_head : nullptr;
    bool by_query = added && bias.of_query;
    if (by_query) transpose_bias(head, bias, added, my);
    for (int64_t at = 0; at < head.queries; at += LANES)
        normalize(head, probabilities + at, at, by_query ? my.bias + at : added, by_query ? head.step : bias.of_key, by_query);
    multiply_heads(head, head.queries, {probabilities, 1, head.step}, rows_of(problem.value, sentence, number), head.keys,
                   rows_of(problem.mixed, sentence, number), head.of_queries(), my);
}

// The gradient of the scores from that of the probabilities, of a vector of queries from `query`, times `scale`; that without it
// goes into `unscaled` if it is not nullptr.
inline void differentiate(const Head &head, const float *probabilities, float *grad, int64_t query, float scale, float *unscaled) {
    int64_t seen = head.seen(query + LANES), step = head.step;
    Vector mean = {};
    for (int64_t key = 0; key < seen; key++) mean += *at(probabilities + key * step) * *at(grad + key * step);
    for (int64_t key = 0; key < head.keys; key++) {
        Vector result = {};
        if (key < seen) result = *at(probabilities + key * step) * (*at(grad + key * step) - mean);
        if (unscaled) *at(unscaled + key * step) = result;
        *at(grad + key * step) = result * scale;
    }
}

inline void backward_head(const Head &head, const Problem &problem, int64_t sentence, int64_t number, const float *probabilities,
                          float *scores_grad, Buffers &my) {
    Rows query = rows_of(problem.query, sentence, number), key = rows_of(problem.key, sentence, number);
    Rows value = rows_of(problem.value, sentence, number), grad = rows_of(problem.mixed, sentence, number);
    transpose(in_whole_vectors(head, grad, head.queries, my.right), head.queries, head.size, 1, my.transposed);
    multiply(head.keys, {value.values, value.step, 1}, {my.transposed, head.step}, {my.scores, head.step}, head.scores());
    for (int64_t at = 0; at < head.queries; at += LANES)
        differentiate(head, probabilities + at, my.scores + at, at, 1 / std::sqrt((float)head.size), scores_grad ? scores_grad + at : nullptr);
    multiply_heads(head, head.keys, {probabilities, head.step, 1}, grad, head.queries, rows_of(problem.value_grad, sentence, number),
                   head.of_keys(), my);
    multiply_heads(head, head.queries, {my.scores, 1, head.step}, key, head.keys, rows_of(problem.query_grad, sentence, number),
                   head.of_queries(), my);
    multiply_heads(head, head.keys, {my.scores, head.step, 1}, query, head.queries, rows_of(problem.key_grad, sentence, number),
                   head.of_keys(), my);
}

// run(head, sentence, number of the head, where its scores begin, scratch), of all heads.
template <typename Run>
void for_each_head(const Problem &problem, int64_t threads, Run run) {
    Head head = {problem.queries,        problem.keys, problem.head_dim, whole_vectors(problem.head_dim), whole_vectors(problem.queries),
                 problem.causal != 0};
    int64_t count = problem.sentences * problem.heads;
#pragma omp parallel num_threads(threads) if (threads > 1 && count > 1)
    {
        Buffers my(head);
#pragma omp for schedule(static)
        for (int64_t each = 0; each < count; each++)
            run(head, each / problem.heads, each % problem.heads, each * head.keys * head.step, my);
    }
}

}  // namespace

extern "C" {

int64_t vector_lanes() { return LANES; }

void attend_forward(const Problem *problem, int64_t threads) {
    for_each_head(*problem, threads, [&](const Head &head, int64_t sentence, int64_t number, int64_t scores, Buffers &my) {
        forward_head(head, *problem, sentence, number, problem->probabilities + scores, my);
    });
}

void attend_backward(const Problem *problem, int64_t threads) {
    for_each_head(*problem, threads, [&](const Head &head, int64_t sentence, int64_t number, int64_t scores, Buffers &my) {
        float *scores_grad = problem->scores_grad ? problem->scores_grad + scores : nullptr;
        backward_head(head, *problem, sentence, number, problem->probabilities + scores, scores_grad, my);
    });
}
}
