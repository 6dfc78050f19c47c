/* cuda_bf16.h of the emulator: the type, whose bits are another's. */
#ifndef AQ_EMULATED_BF16
#define AQ_EMULATED_BF16

#include <stdint.h>
#include <string.h>

struct __nv_bfloat16 {
  uint16_t bits;
  double value(void) const {
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return (double)value;
  }
};

#endif
