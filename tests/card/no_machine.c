/* In the place of ptx.c until it is there: loads anything, runs nothing. */
#include "ptx.h"
#include <string.h>
#include <stdlib.h>
#include <stdio.h>
struct ptx_module { int unused; };
struct ptx_function { int unused; };
static const ptx_function only;
ptx_module *ptx_load(const char *text, char *why, size_t why_bytes) { (void)text; (void)why; (void)why_bytes; return malloc(sizeof(ptx_module)); }
void ptx_unload(ptx_module *module) { free(module); }
const ptx_function *ptx_find(const ptx_module *module, const char *name) { (void)module; (void)name; return &only; }
int ptx_num_parameters(const ptx_function *function) { (void)function; return 0; }
uint32_t ptx_parameter_bytes(const ptx_function *function, int index) { (void)function; (void)index; return 8; }
uint32_t ptx_static_shared_bytes(const ptx_function *function) { (void)function; return 0; }
uint32_t ptx_threads(const ptx_function *function) { (void)function; return 0; }
int ptx_launch(const ptx_function *function, const uint32_t grid[3], const uint32_t block[3], void *const *parameters, uint32_t dynamic_shared_bytes, int ordinal, ptx_counters *counters, char *why, size_t why_bytes)
{ (void)function; (void)grid; (void)block; (void)parameters; (void)dynamic_shared_bytes; (void)ordinal; (void)counters; snprintf(why, why_bytes, "no machine yet"); return 719; }
