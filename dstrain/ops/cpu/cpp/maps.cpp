// Linear maps: packing, and products of any number of rows.

#include "layers.h"

extern "C" {

int panel_outputs() { return PANEL; }

// weight: (outputs, inputs), adjacent.
void pack_panels(const float *weight, int64_t outputs, int64_t inputs, float *panels) {
    for (int64_t first = 0; first < outputs; first += PANEL)
        for (int64_t i = 0; i < inputs; i++)
            for (int64_t column = first; column < first + PANEL; column++)
                *panels++ = column < outputs ? weight[column * inputs + i] : 0;
}

// y (rows, outputs) = x W^T + bias. x: (rows, inputs).
void apply_map(const Map *map, int64_t rows, const float *x, float *y, int64_t threads) {
    int64_t inputs = map->inputs, outputs = map->outputs, whole = outputs / PANEL * PANEL;
    int64_t part = std::max(PANEL, (whole / PANEL + threads - 1) / threads * PANEL);  // of a thread; not 0 if there is no whole panel
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < whole; first += part) apply(*map, rows, x, inputs, false, y, outputs, first, std::min(first + part, whole));
    float rest[MOST_ROWS * PANEL];  // a panel with fewer outputs
    for (int64_t row = 0; row < rows && whole < outputs; row += MOST_ROWS) {
        int64_t count = std::min<int64_t>(rows - row, MOST_ROWS);
        const Map last{map->panels + whole * inputs, map->bias + whole, inputs, PANEL};
        apply(last, count, x + row * inputs, inputs, false, rest, PANEL, 0, PANEL);
        for (int64_t at = 0; at < count; at++) std::memcpy(y + (row + at) * outputs + whole, rest + at * PANEL, (outputs - whole) * sizeof(float));
    }
}
}
