/* trellis/avx512.c: levels of trellis codes with AVX-512 BW. Compiled with the matching -m flags and reached
 * only after a check. */
#include "levels_avx512.h"

#define AQ_NAMED(function) function##_avx512
#include "blocks_avx512.h"
