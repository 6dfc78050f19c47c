/* backward_avx2.c: the loops of backward_loops.h over this instruction set's vectors; the same bits. */
#define AQ_BACKWARD aq_backward_avx2
#include "loops.h"
