// What beam search does between two steps of the model: the best continuations, and the cache's entries of other rows.

#include <limits>
#include <vector>

#include "exponential.h"

namespace {

constexpr int64_t BLOCK = 64;  // columns that are looked at one by one only if one of them is good enough
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// The k best so far, best first; of equal ones the first stays in front. What is not a number is never better.
struct Best {
    float *totals;
    int64_t *tokens, *parents, k;

    void clear() {
        std::fill(totals, totals + k, LOWEST);
        std::fill(tokens, tokens + k, 0);
        std::fill(parents, parents + k, 0);
    }

    float worst() const { return totals[k - 1]; }

    void insert(float total, int64_t token, int64_t parent) {
        int64_t at = k - 1;
        for (; at > 0 && total > totals[at - 1]; at--) {
            totals[at] = totals[at - 1];
            tokens[at] = tokens[at - 1];
            parents[at] = parents[at - 1];
        }
        totals[at] = total, tokens[at] = token, parents[at] = parent;
    }
};

// Whether one of them is good enough.
inline bool some_taken(const float *x, int64_t size, float before, float worst) {
    int some = 0;
#pragma omp simd reduction(| : some)
    for (int64_t i = 0; i < size; i++) some |= x[i] + before > worst;
    return some;
}

void to_log_probs(float *x, int64_t size) {
    float most = x[0], total = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < size; i++) most = x[i] > most ? x[i] : most;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < size; i++) total += exponential(x[i] - most);
    float subtracted = most + std::log(total);
    for (int64_t i = 0; i < size; i++) x[i] -= subtracted;
}

struct Move {
    int64_t position, target, source;
};

}  // namespace

extern "C" {

// log_softmax of each row of (rows, size), in place.
void log_probabilities(float *x, int64_t rows, int64_t size, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) to_log_probs(x + row * size, size);
}

// log_probs: (sentences, beams, entries); totals: (sentences, beams) -> (sentences, k) each; see `../../continuations.py`.
void best_continuations(const float *log_probs, const float *totals, int64_t sentences, int64_t beams, int64_t entries, int64_t k,
                        float *best_totals, int64_t *tokens, int64_t *parents, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && sentences > 1)
    for (int64_t sentence = 0; sentence < sentences; sentence++) {
        Best best{best_totals + sentence * k, tokens + sentence * k, parents + sentence * k, k};
        best.clear();
        for (int64_t parent = 0; parent < beams; parent++) {
            const float *row = log_probs + (sentence * beams + parent) * entries;
            float before = totals[sentence * beams + parent];
            for (int64_t first = 0; first < entries; first += BLOCK) {
                int64_t size = std::min(BLOCK, entries - first);
                bool some = size == BLOCK ? some_taken(row + first, BLOCK, before, best.worst()) : some_taken(row + first, size, before, best.worst());
                if (!some) continue;
                for (int64_t token = first; token < first + size; token++)
                    if (row[token] + before > best.worst()) best.insert(row[token] + before, token, parent);
            }
        }
    }
}

// The hypotheses that `rows` name, each with one more token and total. tokens: (R, length); history: (R, totals_length) float32;
// last, totals: (n,) -> (n, length + 1), (n, totals_length + 1).
void extend_hypotheses(const int64_t *tokens, const float *history, const int64_t *rows, const int64_t *last, const float *totals,
                       int64_t *longer, float *later, int64_t n, int64_t length, int64_t totals_length) {
    for (int64_t row = 0; row < n; row++) {
        longer = std::copy_n(tokens + rows[row] * length, length, longer);
        later = std::copy_n(history + rows[row] * totals_length, totals_length, later);
        *longer++ = last[row];
        *later++ = totals[row];
    }
}

// Row i becomes what row `rows[i]` was, in `length` positions of keys and values. buffers: by depth; steps, in bytes, from keys to
// values and from one row, head and position to the next. makers: the row that made each entry; equal ones are equal entries.
void move_entries(char *const *buffers, int64_t depth, const int64_t *steps, int64_t heads, int64_t head_bytes, int32_t *makers,
                  int64_t makers_step, const int64_t *rows, int64_t num_rows, int64_t length, int64_t threads) {
    std::vector<Move> moves;
    std::vector<int32_t> before(num_rows);
    for (int64_t position = 0; position < length; position++) {
        for (int64_t row = 0; row < num_rows; row++) before[row] = makers[row * makers_step + position];
        for (int64_t row = 0; row < num_rows; row++) {
            if (before[rows[row]] == before[row]) continue;
            moves.push_back({position, row, rows[row]});
            makers[row * makers_step + position] = before[rows[row]];
        }
    }
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < 2 * depth; part++) {
        char *start = buffers[part / 2] + part % 2 * steps[0];
        std::vector<char> read(num_rows * head_bytes);
        for (int64_t head = 0; head < heads; head++)
            for (size_t first = 0, last; first < moves.size(); first = last) {
                char *column = start + head * steps[2] + moves[first].position * steps[3];
                // All of a position are read before one is written: rows may change places.
                for (last = first; last < moves.size() && moves[last].position == moves[first].position; last++)
                    std::memcpy(read.data() + (last - first) * head_bytes, column + moves[last].source * steps[1], head_bytes);
                for (size_t at = first; at < last; at++)
                    std::memcpy(column + moves[at].target * steps[1], read.data() + (at - first) * head_bytes, head_bytes);
            }
    }
}
}
