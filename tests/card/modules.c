/* Modules of PTX, their functions, and launches of them. */

#include "driver.h"

#include <stdlib.h>
#include <string.h>

typedef struct module module;
typedef struct function function;

struct module {
    context *of;
    ptx_module *code;
    int users;   /* launches that have not run */
    bool closed;
    module *next;
};

struct function {
    module *in;
    const ptx_function *code;
    char name[256];
    int most_dynamic_shared;
    function *next;
};

static module *modules;
static function *functions;

static void free_module(module *closed) {
    for (function **link = &functions; *link;) {
        function *each = *link;
        if (each->in != closed) {
            link = &each->next;
            continue;
        }
        *link = each->next;
        free(each);
    }
    for (module **link = &modules; *link; link = &(*link)->next)
        if (*link == closed) {
            *link = closed->next;
            break;
        }
    ptx_unload(closed->code);
    free(closed);
}

void modules_reset(void) {
    while (modules)
        free_module(modules);
}

static CUresult find_module(CUmodule handle, module **found) {
    for (module *each = modules; each; each = each->next)
        if ((CUmodule)each == handle && !each->closed) {
            *found = each;
            return CUDA_SUCCESS;
        }
    return complain(CUDA_ERROR_INVALID_HANDLE, "%p is no module", (void *)handle);
}

static CUresult find_function(CUfunction handle, function **found) {
    for (function *each = functions; each; each = each->next)
        if ((CUfunction)each == handle && !each->in->closed) {
            *found = each;
            return CUDA_SUCCESS;
        }
    return complain(CUDA_ERROR_INVALID_HANDLE, "%p is no function", (void *)handle);
}

/* A real driver takes a cubin as well; this one reads PTX alone. */
static CUresult load(CUmodule *made, const void *image) {
    CUresult error = refused_by_capture();
    if (error)
        return error;
    if (memcmp(image, "\177ELF", 4) == 0)
        return complain(CUDA_ERROR_NO_BINARY_FOR_GPU, "a cubin, where only PTX text is executed");
    char why[REASON_BYTES] = "";
    ptx_module *code = ptx_load(image, why, sizeof why);
    if (!code)
        return complain(CUDA_ERROR_INVALID_PTX, "%s", why);
    module *each = zeroed(sizeof *each);
    *each = (module){.of = current_context(), .code = code, .next = modules};
    modules = each;
    *made = (CUmodule)each;
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuModuleLoadData, 0, (CUmodule *made, const void *image), (made, image)) {
    return load(made, image);
}

ENTRY(NEEDS_CONTEXT, cuModuleLoadDataEx, 0,
      (CUmodule *made, const void *image, unsigned count, CUjit_option *options, void **values),
      (made, image, count, options, values)) {
    (void)count, (void)options, (void)values;
    return load(made, image);
}

ENTRY(NEEDS_CONTEXT, cuModuleUnload, 0, (CUmodule handle), (handle)) {
    module *which;
    CUresult error = find_module(handle, &which);
    if (error)
        return error;
    which->closed = true;
    if (which->users == 0)
        free_module(which);
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuModuleGetFunction, 0, (CUfunction *found, CUmodule handle, const char *name),
      (found, handle, name)) {
    module *in;
    CUresult error = find_module(handle, &in);
    if (error)
        return error;
    const ptx_function *code = ptx_find(in->code, name);
    if (!code)
        return complain(CUDA_ERROR_NOT_FOUND, "the module has no function %s", name);
    function *made = zeroed(sizeof *made);
    *made = (function){.in = in, .code = code, .next = functions};
    strncpy(made->name, name, sizeof made->name - 1);
    functions = made;
    *found = (CUfunction)made;
    return CUDA_SUCCESS;
}

static int most_threads(const function *which) {
    uint32_t said = ptx_threads(which->code);
    return said ? (int)said : 1024;
}

ENTRY(NEEDS_CONTEXT, cuFuncGetAttribute, 0,
      (int *value, CUfunction_attribute attribute, CUfunction handle), (value, attribute, handle)) {
    function *which;
    CUresult error = find_function(handle, &which);
    if (error)
        return error;
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = most_threads(which);
        return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
        *value = (int)ptx_static_shared_bytes(which->code);
        return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
        *value = which->most_dynamic_shared;
        return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: /* ptxas decides on registers: nothing is known here */
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
        *value = 0;
        return CUDA_SUCCESS;
    default:
        return complain(CUDA_ERROR_INVALID_VALUE, "attribute %d is not imitated", (int)attribute);
    }
}

/* Newer than the drivers that are imitated, and than some headers. */
#define SHARED_MEMORY_MODE ((CUfunction_attribute)17)

ENTRY(NEEDS_CONTEXT, cuFuncSetAttribute, 0,
      (CUfunction handle, CUfunction_attribute attribute, int value), (handle, attribute, value)) {
    function *which;
    CUresult error = find_function(handle, &which);
    if (error)
        return error;
    if (attribute == SHARED_MEMORY_MODE)
        return CUDA_ERROR_INVALID_VALUE; /* which launchers try first, and do without */
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
        return complain(CUDA_ERROR_INVALID_VALUE, "attribute %d is not imitated", (int)attribute);
    if (value < 0 || value + (int)ptx_static_shared_bytes(which->code) > 227 << 10)
        return complain(CUDA_ERROR_INVALID_VALUE, "%d bytes of shared memory", value);
    which->most_dynamic_shared = value;
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuFuncSetCacheConfig, 0, (CUfunction handle, CUfunc_cache wanted),
      (handle, wanted)) {
    (void)wanted;
    function *which;
    return find_function(handle, &which);
}

/* -- launches -- */

typedef struct {
    operation base;
    function *what;
    uint32_t grid[3], block[3];
    uint32_t dynamic_shared;
    void **parameters; /* with the values behind them, in one piece */
} launch;

static CUresult run_launch(operation *self, char *why, size_t why_bytes) {
    launch *of = (launch *)self;
    ptx_counters counters = {0};
    int error = ptx_launch(of->what->code, of->grid, of->block, of->parameters, of->dynamic_shared,
                           of->what->in->of->ordinal, &counters, why, why_bytes);
    note_launch(of->what->name, &counters);
    return (CUresult)error;
}

static void discard_launch(operation *self) {
    launch *of = (launch *)self;
    module *in = of->what->in;
    if (--in->users == 0 && in->closed)
        free_module(in);
    free(of->parameters);
    free(of);
}

/* The values as they are at the call: the caller's are gone when the launch runs. */
static void **copy_of_parameters(const ptx_function *code, void **values) {
    int count = ptx_num_parameters(code);
    size_t bytes = (size_t)count * sizeof(void *);
    for (int i = 0; i < count; i++)
        bytes += (ptx_parameter_bytes(code, i) + 7) / 8 * 8;
    void **copies = zeroed(bytes);
    char *next = (char *)(copies + count);
    for (int i = 0; i < count; i++) {
        copies[i] = memcpy(next, values[i], ptx_parameter_bytes(code, i));
        next += (ptx_parameter_bytes(code, i) + 7) / 8 * 8;
    }
    return copies;
}

static CUresult check_shape(const function *what, const CUlaunchConfig *shape) {
    uint64_t threads = (uint64_t)shape->blockDimX * shape->blockDimY * shape->blockDimZ;
    if (!shape->gridDimX || !shape->gridDimY || !shape->gridDimZ || shape->gridDimX > INT32_MAX ||
        shape->gridDimY > UINT16_MAX || shape->gridDimZ > UINT16_MAX)
        return complain(CUDA_ERROR_INVALID_VALUE, "a grid of %u x %u x %u", shape->gridDimX,
                        shape->gridDimY, shape->gridDimZ);
    if (threads == 0 || threads > (uint64_t)most_threads(what))
        return complain(CUDA_ERROR_INVALID_VALUE, "%llu threads, of at most %d",
                        (unsigned long long)threads, most_threads(what));
    uint64_t shared = (uint64_t)shape->sharedMemBytes + ptx_static_shared_bytes(what->code);
    uint64_t most = ptx_static_shared_bytes(what->code) + (uint64_t)what->most_dynamic_shared;
    if (shared > 48 << 10 && shared > most)
        return complain(CUDA_ERROR_INVALID_VALUE, "%llu bytes of shared memory",
                        (unsigned long long)shared);
    return CUDA_SUCCESS;
}

static CUresult launch_on(CUfunction handle, const CUlaunchConfig *shape, void **values,
                          void **extra) {
    function *what;
    stream *on;
    CUresult error = find_function(handle, &what);
    if (!error)
        error = find_stream(shape->hStream, true, &on);
    if (!error)
        error = check_shape(what, shape);
    if (error)
        return error;
    if (what->in->of != on->of)
        return complain(CUDA_ERROR_INVALID_HANDLE, "%s was loaded for device %d, not for %d",
                        what->name, what->in->of->ordinal, on->of->ordinal);
    if (extra || (!values && ptx_num_parameters(what->code) > 0))
        return complain(CUDA_ERROR_INVALID_VALUE, "%s: parameters are taken one by one alone",
                        what->name);
    launch *made = zeroed(sizeof *made);
    *made = (launch){.base = {.is_work = true, .run = run_launch, .discard = discard_launch},
                     .what = what,
                     .grid = {shape->gridDimX, shape->gridDimY, shape->gridDimZ},
                     .block = {shape->blockDimX, shape->blockDimY, shape->blockDimZ},
                     .dynamic_shared = shape->sharedMemBytes,
                     .parameters = copy_of_parameters(what->code, values)};
    what->in->users++;
    return enqueue(on, &made->base);
}

ENTRY(NEEDS_CONTEXT, cuLaunchKernel, on,
      (CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
       unsigned block_y, unsigned block_z, unsigned shared, CUstream on, void **values,
       void **extra),
      (handle, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, on, values, extra)) {
    CUlaunchConfig shape = {.gridDimX = grid_x,
                            .gridDimY = grid_y,
                            .gridDimZ = grid_z,
                            .blockDimX = block_x,
                            .blockDimY = block_y,
                            .blockDimZ = block_z,
                            .sharedMemBytes = shared,
                            .hStream = on};
    return launch_on(handle, &shape, values, extra);
}

ENTRY(NEEDS_CONTEXT, cuLaunchKernelEx, shape->hStream,
      (const CUlaunchConfig *shape, CUfunction handle, void **values, void **extra),
      (shape, handle, values, extra)) {
    for (unsigned i = 0; i < shape->numAttrs; i++)
        if (shape->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
            return complain(CUDA_ERROR_NOT_SUPPORTED, "clusters are not imitated");
    return launch_on(handle, shape, values, extra);
}
