/* backward/avx2.c: loops.h compiled for this instruction set's vectors; the same bits. */
#define AQ_NAMED(family) aq_##family##_avx2
#include "loops.h"
