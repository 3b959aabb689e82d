// Two numbers of the standard normal distribution from two words of random bits (Box and Muller, 1958). Logarithm, sine
// and cosine are written out, so that their bits are the same everywhere; their error is below 4e-7.
#pragma once

#include <numbers>

#include "core/target.h"

namespace onepass {

template <class V>
struct NormalPair {
  V first, second;
};

// `V`: floats; `I`: as many 32-bit integers, with >>, shift_right (of signed ones), <<, &, ^, -, to_float, float_of,
// bits_of.
template <class V, class I>
HD NormalPair<V> normal_pair(I a, I b) {
  // ln(u) for u in (0, 1], from its exponent and its mantissa between sqrt(1/2) and sqrt(2).
  const V u = to_float((a >> 8) + I(1U)) * V(0x1p-24F);
  const I bits = bits_of(u);
  const I exponent = shift_right(bits - I(0x3F3504F3U), 23);
  const V f = float_of(bits - (exponent << 23)) - V(1.0F);
  const V s = f / (V(2.0F) + f);
  const V w = s * s;
  const V series = V(1.0F) + w * (V(1.0F / 3.0F) + w * (V(1.0F / 5.0F) + w * (V(1.0F / 7.0F) + w * V(1.0F / 9.0F))));
  const V ln = to_float(exponent) * V(std::numbers::ln2_v<float>) + (s + s) * series;
  const V radius = sqrt(V(-2.0F) * ln);

  // An angle within an eighth of a turn; the two last bits turn it into the other three quarters.
  const V x = to_float((b >> 6) & I(0xFFFFFFU)) * V(0x1p-24F) - V(0.5F);
  const V q = x * V(std::numbers::pi_v<float> / 2.0F);
  const V y = q * q;
  const V sine =
      q *
      (V(1.0F) + y * (V(-1.0F / 6.0F) + y * (V(1.0F / 120.0F) + y * (V(-1.0F / 5040.0F) + y * V(1.0F / 362880.0F)))));
  const V cosine =
      V(1.0F) + y * (V(-1.0F / 2.0F) + y * (V(1.0F / 24.0F) + y * (V(-1.0F / 720.0F) + y * V(1.0F / 40320.0F))));
  const I swap = I(0U) - (b & I(1U));
  const I sign = (b & I(2U)) << 30;
  const I difference = (bits_of(sine) ^ bits_of(cosine)) & swap;
  return {radius * float_of(bits_of(cosine) ^ difference ^ sign), radius * float_of(bits_of(sine) ^ difference ^ sign)};
}

}  // namespace onepass
