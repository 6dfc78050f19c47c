/* backward/scalar.c: loops.h compiled for every processor of an architecture. */
#define AQ_NAMED(family) aq_##family##_scalar
#include "loops.h"
