// The token loss of aggregate (token_loss_math.h); host and device.
#pragma once

#include "token_loss_math.h"

namespace entropy_rl {

// The value itself.
template <class T>
struct PlainValue {
  ENTROPY_RL_HD TokenResult<T> operator()(const Token<T>& token) const {
    TokenResult<T> out{};
    out.loss = token.log_prob;
    out.gradient = T(1);
    return out;
  }
};

}  // namespace entropy_rl
