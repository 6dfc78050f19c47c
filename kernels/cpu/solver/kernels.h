/* solver/kernels.h: sizes of what the solvers of rows work on. */
#ifndef AQ_SOLVER_H
#define AQ_SOLVER_H

#include "../packed.h"
#include "../stop.h"

/* Most rows that a kernel works on at once: floats from one column of a panel to the next. */
#define AQ_PANEL 32

/* Columns whose updates of the others are applied together; at least AQ_PANEL. */
#define AQ_SOLVER_BLOCK 48

#endif
