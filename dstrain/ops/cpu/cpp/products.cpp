// Products of matrices of many rows: blocks of the right one are packed into panels, the left one is read where it lies.
//
// A block of the right matrix stays in the L2 cache while all rows pass, a block of the left one while all its panels pass.
// The order of a sum depends neither on the rows beside it nor on the threads.

#include "layers.h"

namespace {

constexpr int64_t INNER = 256, COLUMNS = 256, STRIP = 16 * MOST_ROWS;  // of a block

struct Matrix {
    const float *data;
    int64_t of_row, of_column;  // steps from one to the next; one of them is 1

    Matrix from(int64_t row, int64_t column) const { return {data + row * of_row + column * of_column, of_row, of_column}; }
};

// y (ROWS, PANEL) = left (ROWS, inner) panel (inner, PANEL) + bias, or that added to y.
template <int ROWS>
void multiply_tile(const Matrix &left, const float *panel, int64_t inner, const float *bias, bool add, float *y, int64_t y_step) {
    for (int row = 0; row < ROWS; row++)  // a row of y may be on a page of its own
        for (int half = 0; half < 2; half++) __builtin_prefetch(y + row * y_step + half * LANES, 1);
    Vector sums[ROWS][2] = {};
    const float *x = left.data;
    for (int64_t i = 0; i < inner; i++, x += left.of_column, panel += PANEL)
        for (int row = 0; row < ROWS; row++)
            for (int half = 0; half < 2; half++) sums[row][half] += x[row * left.of_row] * *(const Vector *)(panel + half * LANES);
    for (int row = 0; row < ROWS; row++)
        for (int half = 0; half < 2; half++) {
            Vector *to = (Vector *)(y + row * y_step + half * LANES), total = sums[row][half];
            if (bias) total += *(const Vector *)(bias + half * LANES);
            *to = add ? *to + total : total;
        }
}

template <int ROWS>
void multiply_rows(int64_t rows, const Matrix &left, const float *panel, int64_t inner, const float *bias, bool add, float *y, int64_t y_step) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return multiply_tile<ROWS>(left, panel, inner, bias, add, y, y_step);
        multiply_rows<ROWS - 1>(rows, left, panel, inner, bias, add, y, y_step);
    }
}

// The same of the last panel, which has fewer columns.
void multiply_last(int64_t rows, int64_t columns, const Matrix &left, const float *panel, int64_t inner, const float *bias, bool add, float *y,
                   int64_t y_step) {
    float tile[MOST_ROWS * PANEL];
    multiply_rows<MOST_ROWS>(rows, left, panel, inner, nullptr, false, tile, PANEL);
    for (int64_t row = 0; row < rows; row++, y += y_step)
        for (int64_t column = 0; column < columns; column++) {
            float total = tile[row * PANEL + column] + (bias ? bias[column] : 0);
            y[column] = add ? y[column] + total : total;
        }
}

// Up to PANEL columns, with zeros behind them.
void pack_panel(const Matrix &right, int64_t inner, int64_t columns, float *panel) {
    if (columns < PANEL) std::fill(panel, panel + inner * PANEL, 0.0f);
    if (right.of_column != 1) {
        for (int64_t start = 0; start < inner; start += LANES)  // lines of both at once
            for (int64_t column = 0; column < columns; column++)
                for (int64_t i = start; i < std::min(start + LANES, inner); i++) panel[i * PANEL + column] = *right.from(i, column).data;
    } else if (columns == PANEL) {
        for (int64_t i = 0; i < inner; i++) std::memcpy(panel + i * PANEL, right.from(i, 0).data, PANEL * sizeof(float));
    } else {
        for (int64_t i = 0; i < inner; i++) std::memcpy(panel + i * PANEL, right.from(i, 0).data, columns * sizeof(float));
    }
}

// Rows of a transposed matrix, MOST_ROWS side by side.
void pack_strip(const Matrix &left, int64_t rows, int64_t inner, int64_t step, float *copy) {
    for (int64_t i = 0; i < inner; i++) {
        int64_t row = 0;
        float *to = copy + i * MOST_ROWS;
        for (; row + MOST_ROWS <= rows; row += MOST_ROWS, to += step) std::memcpy(to, left.from(row, i).data, MOST_ROWS * sizeof(float));
        if (row < rows) std::memcpy(to, left.from(row, i).data, (rows - row) * sizeof(float));
    }
}

}  // namespace

extern "C" {

// y (rows, columns) = left (rows, inner) right (inner, columns) + bias (columns) unless that is null, or that added to y.
void multiply_matrices(const Matrix *left, const Matrix *right, const float *bias, int64_t rows, int64_t inner, int64_t columns, int64_t add,
                       float *y, int64_t y_step, int64_t threads) {
    constexpr int64_t step = INNER * MOST_ROWS + LANES;  // between packed rows; by a power of two they would evict one another
    int64_t share = (rows + threads - 1) / threads, strip = std::min(STRIP, (share + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS);
    std::vector<float> panels(std::min(inner, INNER) * std::min(whole_panels(columns), COLUMNS));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> copy(left->of_column == 1 ? 0 : step * (STRIP / MOST_ROWS));
        for (int64_t first = 0; first < columns; first += COLUMNS)
            for (int64_t start = 0; start < inner; start += INNER) {
                int64_t width = std::min(COLUMNS, columns - first), depth = std::min(INNER, inner - start);
                const float *its_bias = start + depth == inner && bias ? bias + first : nullptr;
#pragma omp for
                for (int64_t column = 0; column < width; column += PANEL)
                    pack_panel(right->from(start, first + column), depth, std::min(PANEL, width - column), panels.data() + column * depth);
#pragma omp for
                for (int64_t begin = 0; begin < rows; begin += strip) {
                    int64_t end = std::min(begin + strip, rows);
                    if (!copy.empty()) pack_strip(left->from(begin, start), end - begin, depth, step, copy.data());
                    for (int64_t column = 0; column < width; column += PANEL)
                        for (int64_t row = begin; row < end; row += MOST_ROWS) {
                            int64_t count = std::min<int64_t>(MOST_ROWS, end - row);
                            Matrix part = left->from(row, start);
                            if (!copy.empty()) part = {copy.data() + (row - begin) / MOST_ROWS * step, 1, MOST_ROWS};
                            const float *panel = panels.data() + column * depth, *tile_bias = its_bias ? its_bias + column : nullptr;
                            float *to = y + row * y_step + first + column;
                            if (width - column >= PANEL)
                                multiply_rows<MOST_ROWS>(count, part, panel, depth, tile_bias, add || start > 0, to, y_step);
                            else
                                multiply_last(count, width - column, part, panel, depth, tile_bias, add || start > 0, to, y_step);
                        }
                }
            }
    }
}
}
