/* backward_avx512.c: the loops of backward_loops.h over this instruction set's vectors; the same bits. */
#define AQ_BACKWARD aq_backward_avx512
#include "loops.h"
