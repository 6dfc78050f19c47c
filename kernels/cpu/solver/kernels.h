/* solver/kernels.h: sizes of what the solvers of rows work on. */
#ifndef AQ_SOLVER_H
#define AQ_SOLVER_H

#include "../packed.h"
#include "../product/kernels.h"
#include "../stop.h"

/* Rows of one call, and what they are rounded up to: floats from one column of a panel to the next. */
#define AQ_PANEL_ROWS AQ_PRODUCT_ROWS
#define AQ_PANEL 192

/* Columns whose errors are carried on one after the other, and that take all others' at once. */
#define AQ_PART 32
#define AQ_FEEDBACK_BLOCK 256

/* Columns that descend before the others take their steps; as many as the widest group where grids are
 * refitted group by group. */
#define AQ_DESCENT_BLOCK 128
#define AQ_DESCENT_MOST AQ_SEGMENT

#endif
