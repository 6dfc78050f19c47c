/* trellis/avx512_vnni.c: a token alone on trellis codes with VNNI, where the processor has no VBMI. Compiled
 * with the matching -m flags and reached only after a check. */
#include "levels_avx512.h"

#include "token_avx512.h"

const aq_trellis_tokens aq_tokens_avx512_vnni = AQ_TOKENS;
