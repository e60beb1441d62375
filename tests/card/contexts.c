/* Devices, their attributes, and the primary contexts: one of each device, current to threads. */

#include "driver.h"

#include <stdio.h>
#include <string.h>

static context contexts[MOST_DEVICES];

/* A reset ends the stacks of all threads, though each can only see its own. */
static int generation;
#define MOST_PUSHED 32
static _Thread_local struct {
    int generation;
    int depth; /* 0: nothing is current */
    context *stack[MOST_PUSHED];
} own;

void contexts_reset(void) {
    memset(contexts, 0, sizeof contexts);
    for (int ordinal = 0; ordinal < MOST_DEVICES; ordinal++)
        contexts[ordinal].ordinal = ordinal;
    generation++;
}

context *context_of(int ordinal) { return &contexts[ordinal]; }

context *current_context(void) {
    if (own.generation != generation) {
        own.generation = generation;
        own.depth = 0;
    }
    return own.depth ? own.stack[own.depth - 1] : NULL;
}

void lose_context(context *of, CUresult error) {
    of->lost = error;
    drop_queued(of);
}

/* -- initialisation and devices -- */

ENTRY(NEEDS_NOTHING, cuInit, 0, (unsigned int flags), (flags)) {
    if (flags != 0)
        return complain(CUDA_ERROR_INVALID_VALUE, "flags are 0x%x, not 0", flags);
    if (configuration.num_devices == 0)
        return complain(CUDA_ERROR_NO_DEVICE, "there is no device");
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_NOTHING, cuDriverGetVersion, 0, (int *version), (version)) {
    *version = configuration.driver_version;
    return CUDA_SUCCESS;
}

static CUresult check_device(CUdevice device) {
    if (device >= 0 && device < configuration.num_devices)
        return CUDA_SUCCESS;
    return complain(CUDA_ERROR_INVALID_DEVICE, "there is no device %d", device);
}

ENTRY(NEEDS_INIT, cuDeviceGetCount, 0, (int *count), (count)) {
    *count = configuration.num_devices;
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_INIT, cuDeviceGet, 0, (CUdevice *device, int ordinal), (device, ordinal)) {
    *device = ordinal;
    return check_device(ordinal);
}

ENTRY(NEEDS_INIT, cuDeviceGetName, 0, (char *name, int bytes, CUdevice device),
      (name, bytes, device)) {
    snprintf(name, (size_t)bytes, "imitated card");
    return check_device(device);
}

ENTRY(NEEDS_INIT, cuDeviceTotalMem_v2, 0, (size_t *bytes, CUdevice device), (bytes, device)) {
    *bytes = configuration.device_bytes;
    return check_device(device);
}

static void fill_uuid(CUuuid *uuid, CUdevice device) {
    memset(uuid->bytes, 0xCA, sizeof uuid->bytes);
    uuid->bytes[15] = (char)device;
}

ENTRY(NEEDS_INIT, cuDeviceGetUuid_v2, 0, (CUuuid *uuid, CUdevice device), (uuid, device)) {
    fill_uuid(uuid, device);
    return check_device(device);
}

ENTRY(NEEDS_INIT, cuDeviceGetPCIBusId, 0, (char *id, int bytes, CUdevice device),
      (id, bytes, device)) {
    snprintf(id, (size_t)bytes, "0000:%02x:00.0", device + 1);
    return check_device(device);
}

ENTRY(NEEDS_INIT, cuDeviceCanAccessPeer, 0, (int *can, CUdevice device, CUdevice peer),
      (can, device, peer)) {
    *can = 0;
    CUresult error = check_device(device);
    return error ? error : check_device(peer);
}

/* Of an H100 SXM where the configuration says nothing. */
static CUresult attribute_value(CUdevice_attribute attribute, CUdevice device, int *value) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
        *value = configuration.compute_major;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
        *value = configuration.compute_minor;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
        *value = configuration.num_multiprocessors;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
        *value = configuration.num_copy_engines;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_INTEGRATED:
        *value = configuration.integrated;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS:
    case CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES:
        *value = configuration.pageable_memory_access;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
        *value = configuration.registered_offset == 0;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID:
        *value = configuration.host_numa_id;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
        *value = device + 1;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID:
    case CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID:
    case CU_DEVICE_ATTRIBUTE_COMPUTE_MODE:
    case CU_DEVICE_ATTRIBUTE_TCC_DRIVER:
        *value = 0;
        return CUDA_SUCCESS;
    /* What the device can do, not what its system lets it: a refusal is met at the call. */
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS:
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
        *value = 1;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
        *value = 32;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = 1024;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
        *value = 65536;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
        *value = 48 << 10;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
        *value = 227 << 10;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
        *value = 228 << 10;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
        *value = 1980000;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
        *value = 2619000;
        return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
        *value = 5120;
        return CUDA_SUCCESS;
    default:
        return complain(CUDA_ERROR_INVALID_VALUE, "attribute %d is not imitated", (int)attribute);
    }
}

ENTRY(NEEDS_INIT, cuDeviceGetAttribute, 0,
      (int *value, CUdevice_attribute attribute, CUdevice device), (value, attribute, device)) {
    CUresult error = check_device(device);
    return error ? error : attribute_value(attribute, device, value);
}

/* -- contexts -- */

ENTRY(NEEDS_INIT, cuDevicePrimaryCtxRetain, 0, (CUcontext *retained, CUdevice device),
      (retained, device)) {
    CUresult error = check_device(device);
    if (error)
        return error;
    context *of = &contexts[device];
    if (of->references++ == 0 && !of->legacy)
        of->legacy = new_stream(of, CU_STREAM_DEFAULT, 0);
    of->ever_active = 1;
    *retained = (CUcontext)of;
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_INIT, cuDevicePrimaryCtxRelease_v2, 0, (CUdevice device), (device)) {
    CUresult error = check_device(device);
    if (error)
        return error;
    if (contexts[device].references == 0)
        return complain(CUDA_ERROR_INVALID_CONTEXT, "device %d's context is not retained", device);
    /* What was made there stays: it is a test's business to see that it was freed before. */
    contexts[device].references--;
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_INIT, cuDevicePrimaryCtxGetState, 0, (CUdevice device, unsigned *flags, int *active),
      (device, flags, active)) {
    CUresult error = check_device(device);
    if (error)
        return error;
    *flags = 0;
    *active = contexts[device].references > 0;
    return CUDA_SUCCESS;
}

static CUresult check_context(CUcontext handle) {
    for (int device = 0; device < configuration.num_devices; device++)
        if (handle == (CUcontext)&contexts[device] && contexts[device].references > 0)
            return CUDA_SUCCESS;
    return complain(CUDA_ERROR_INVALID_CONTEXT, "%p is no context", (void *)handle);
}

ENTRY(NEEDS_INIT, cuCtxGetCurrent, 0, (CUcontext *current), (current)) {
    *current = (CUcontext)current_context();
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_INIT, cuCtxSetCurrent, 0, (CUcontext wanted), (wanted)) {
    if (wanted) {
        CUresult error = check_context(wanted);
        if (error)
            return error;
    }
    current_context(); /* makes the stack this card's own */
    if (own.depth > 0)
        own.depth--;
    if (wanted)
        own.stack[own.depth++] = (context *)wanted;
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_INIT, cuCtxPushCurrent_v2, 0, (CUcontext wanted), (wanted)) {
    CUresult error = check_context(wanted);
    if (error)
        return error;
    current_context();
    if (own.depth == MOST_PUSHED)
        return complain(CUDA_ERROR_INVALID_VALUE, "%d contexts are pushed", MOST_PUSHED);
    own.stack[own.depth++] = (context *)wanted;
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_INIT, cuCtxPopCurrent_v2, 0, (CUcontext *popped), (popped)) {
    context *current = current_context();
    if (!current)
        return complain(CUDA_ERROR_INVALID_CONTEXT, "there is none to pop");
    own.depth--;
    if (popped)
        *popped = (CUcontext)current;
    return CUDA_SUCCESS;
}

/* Of a lost context, too: who asks wants to know where he is. */
ENTRY(NEEDS_INIT, cuCtxGetDevice, 0, (CUdevice *device), (device)) {
    if (!current_context())
        return complain(CUDA_ERROR_INVALID_CONTEXT, "no context is current to thread %d",
                        current_thread());
    *device = current_context()->ordinal;
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuCtxGetStreamPriorityRange, 0, (int *least, int *greatest),
      (least, greatest)) {
    if (least)
        *least = 0;
    if (greatest)
        *greatest = -5;
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuCtxSynchronize, 0, (void), ()) {
    CUresult error = refused_by_capture();
    if (error)
        return error;
    drain_context(current_context());
    return current_context()->lost;
}

ENTRY(NEEDS_CONTEXT, cuCtxGetLimit, 0, (size_t *value, CUlimit limit), (value, limit)) {
    (void)limit;
    *value = 1 << 20;
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuCtxSetLimit, 0, (CUlimit limit, size_t value), (limit, value)) {
    (void)limit, (void)value;
    return CUDA_SUCCESS;
}
