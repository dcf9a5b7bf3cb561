// The token loss of aggregate (token_loss_math.h); host and device.
#pragma once

#include "token_loss_math.h"

namespace entropy_rl {

// The value itself.
template <class T>
struct PlainValue {
  template <class Value = T>
  ENTROPY_RL_HD TokenResult<Value> operator()(const Token<Value>& token) const {
    TokenResult<Value> out{};
    out.loss = token.log_prob;
    out.gradient = Value{} + T(1);
    return out;
  }
};

}  // namespace entropy_rl
