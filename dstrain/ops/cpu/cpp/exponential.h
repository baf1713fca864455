// e^x that loops can be vectorized with.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// Within 2e-7 of e^x; 0 below -87.3, e^88 above 88; what is not a number stays so. Branchless, so that loops of it are vectorized.
inline float exponential(float x) {
    float low = x < -87.3f ? -87.3f : x, within = low > 88.0f ? 88.0f : low;
    float whole = std::floor(within * 1.44269504f + 0.5f);
    float rest = within - whole * 0.693359375f + whole * 2.12194440e-4f;
    float series = 1.98412698e-4f;
    for (float factor : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f}) series = series * rest + factor;
    int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return x < -87.3f ? 0.0f : series * power;
}

}  // namespace
