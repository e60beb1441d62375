/* Memory of the device, and memory of the host that the device can reach. */

#include "driver.h"

#include <stdlib.h>
#include <string.h>

typedef struct allocation allocation;

struct allocation {
    uint64_t host;
    uint64_t bytes;
    memory_kind kind;
    int ordinal; /* of the device whose context was current */
    unsigned flags;
    uint64_t number; /* CU_POINTER_ATTRIBUTE_BUFFER_ID */
    allocation *next;
};

/* Of new memory: what the host sees of a byte that nothing wrote. */
#define POISON 0xDB
#define ALIGNMENT 512

static allocation *allocations;
static uint64_t allocations_made;
static uint64_t device_bytes_taken[MOST_DEVICES];

static allocation **link_of(uint64_t host) {
    allocation **link = &allocations;
    while (*link && (*link)->host != host)
        link = &(*link)->next;
    return link;
}

/* The driver does not know it any more. */
static void take_out(allocation **link) {
    allocation *gone = *link;
    *link = gone->next;
    memory_remove(gone->host);
    if (gone->kind == MEMORY_DEVICE)
        device_bytes_taken[gone->ordinal] -= gone->bytes;
    free(gone);
}

/* Memory that is the driver's own goes back; registered memory is its owner's. */
static void forget(allocation **link) {
    uint64_t host = (*link)->host;
    bool own = (*link)->kind != MEMORY_REGISTERED;
    take_out(link);
    if (own)
        free((void *)(uintptr_t)host);
}

/* Gives nothing back: who still holds what lay on the card before must not meet another's bytes. */
void allocations_reset(void) {
    while (allocations)
        take_out(&allocations);
}

bool reaches_known_memory(uint64_t host, uint64_t bytes) {
    for (const allocation *each = allocations; each; each = each->next)
        if (each->host < host + bytes && host < each->host + each->bytes)
            return true;
    return false;
}

static int note(uint64_t host, uint64_t bytes, memory_kind kind, unsigned flags) {
    memory_range range = {.host = host, .device = host, .bytes = bytes, .kind = kind};
    range.ordinal = kind == MEMORY_DEVICE ? current_context()->ordinal : ANY_ORDINAL;
    if (kind == MEMORY_REGISTERED)
        range.device += configuration.registered_offset;
    if (memory_add(range, kind == MEMORY_DEVICE) != 0)
        return -1;
    allocation *made = zeroed(sizeof *made);
    *made = (allocation){.host = host,
                         .bytes = bytes,
                         .kind = kind,
                         .ordinal = current_context()->ordinal,
                         .flags = flags,
                         .number = ++allocations_made,
                         .next = allocations};
    allocations = made;
    return 0;
}

static CUresult allocate(uint64_t *address, size_t bytes, memory_kind kind, unsigned flags) {
    void *memory;
    size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (bytes == 0)
        return complain(CUDA_ERROR_INVALID_VALUE, "no bytes");
    if (posix_memalign(&memory, ALIGNMENT, rounded) != 0)
        return complain(CUDA_ERROR_OUT_OF_MEMORY, "%zu bytes", bytes);
    memset(memory, POISON, rounded);
    *address = (uint64_t)(uintptr_t)memory;
    if (note(*address, bytes, kind, flags) == 0)
        return CUDA_SUCCESS;
    free(memory);
    return complain(CUDA_ERROR_INVALID_VALUE, "%zu bytes lie in a range that is registered", bytes);
}

static CUresult allocate_on_device(CUdeviceptr *made, size_t bytes) {
    uint64_t *taken = &device_bytes_taken[current_context()->ordinal];
    if (bytes > configuration.device_bytes - *taken)
        return complain(CUDA_ERROR_OUT_OF_MEMORY, "%zu bytes, of which %llu are free", bytes,
                        (unsigned long long)(configuration.device_bytes - *taken));
    uint64_t address;
    CUresult error = allocate(&address, bytes, MEMORY_DEVICE, 0);
    if (!error) {
        *taken += bytes;
        *made = address;
    }
    return error;
}

static CUresult find(uint64_t host, memory_kind kind, CUresult otherwise, allocation ***link) {
    *link = link_of(host);
    if (**link && (**link)->kind == kind)
        return CUDA_SUCCESS;
    return complain(otherwise, "0x%llx is not where such memory begins", (unsigned long long)host);
}

/* -- of the device -- */

ENTRY(NEEDS_CONTEXT, cuMemAlloc_v2, 0, (CUdeviceptr *made, size_t bytes), (made, bytes)) {
    CUresult error = refused_by_capture();
    return error ? error : allocate_on_device(made, bytes);
}

/* Waits for the device, as the real one does. */
ENTRY(NEEDS_CONTEXT, cuMemFree_v2, 0, (CUdeviceptr address), (address)) {
    if (address == 0)
        return CUDA_SUCCESS;
    allocation **link;
    CUresult error = refused_by_capture();
    if (!error)
        error = find(address, MEMORY_DEVICE, CUDA_ERROR_INVALID_VALUE, &link);
    if (error)
        return error;
    drain_context(current_context());
    forget(link_of(address));
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuMemGetInfo_v2, 0, (size_t *free_bytes, size_t *total), (free_bytes, total)) {
    *total = configuration.device_bytes;
    *free_bytes = configuration.device_bytes - device_bytes_taken[current_context()->ordinal];
    return CUDA_SUCCESS;
}

/* The memory is there at once: whoever uses it too early is not found out. */
ENTRY(NEEDS_CONTEXT, cuMemAllocAsync, on, (CUdeviceptr *made, size_t bytes, CUstream on),
      (made, bytes, on)) {
    stream *where;
    CUresult error = find_stream(on, true, &where);
    return error ? error : allocate_on_device(made, bytes);
}

typedef struct {
    operation base;
    uint64_t address;
} release;

static CUresult run_release(operation *self, char *why, size_t why_bytes) {
    (void)why, (void)why_bytes;
    allocation **link = link_of(((release *)self)->address);
    if (*link)
        forget(link);
    return CUDA_SUCCESS;
}

static void discard_release(operation *self) { free(self); }

/* When the stream comes to it; later work that uses the memory finds it gone. */
ENTRY(NEEDS_CONTEXT, cuMemFreeAsync, on, (CUdeviceptr address, CUstream on), (address, on)) {
    stream *where;
    allocation **link;
    CUresult error = find_stream(on, true, &where);
    if (!error)
        error = find(address, MEMORY_DEVICE, CUDA_ERROR_INVALID_VALUE, &link);
    if (error)
        return error;
    release *made = zeroed(sizeof *made);
    *made = (release){{.run = run_release, .discard = discard_release}, address};
    return enqueue(where, &made->base);
}

/* -- of the host -- */

static CUresult allocate_pinned(void **made, size_t bytes, unsigned flags) {
    CUresult error = refused_by_capture();
    if (error)
        return error;
    if (configuration.pinning)
        return complain((CUresult)configuration.pinning, "this card's system pins no memory");
    uint64_t address;
    error = allocate(&address, bytes, MEMORY_PINNED, flags);
    if (!error)
        *made = (void *)(uintptr_t)address;
    return error;
}

ENTRY(NEEDS_CONTEXT, cuMemHostAlloc, 0, (void **made, size_t bytes, unsigned flags),
      (made, bytes, flags)) {
    if (flags & ~(unsigned)(CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP |
                            CU_MEMHOSTALLOC_WRITECOMBINED))
        return complain(CUDA_ERROR_INVALID_VALUE, "flags are 0x%x", flags);
    return allocate_pinned(made, bytes, flags);
}

ENTRY(NEEDS_CONTEXT, cuMemAllocHost_v2, 0, (void **made, size_t bytes), (made, bytes)) {
    return allocate_pinned(made, bytes, 0);
}

/* Waits for the device, as the real one does. */
ENTRY(NEEDS_CONTEXT, cuMemFreeHost, 0, (void *memory), (memory)) {
    uint64_t address = (uint64_t)(uintptr_t)memory;
    allocation **link;
    CUresult error = refused_by_capture();
    if (!error)
        error = find(address, MEMORY_PINNED, CUDA_ERROR_INVALID_VALUE, &link);
    if (error)
        return error;
    drain_context(current_context());
    forget(link_of(address));
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuMemHostRegister_v2, 0, (void *memory, size_t bytes, unsigned flags),
      (memory, bytes, flags)) {
    CUresult error = refused_by_capture();
    if (error)
        return error;
    if (configuration.registering)
        return complain((CUresult)configuration.registering, "this card's system registers none");
    if (!memory || bytes == 0 ||
        flags & ~(unsigned)(CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP))
        return complain(CUDA_ERROR_INVALID_VALUE, "%zu bytes at %p, flags 0x%x", bytes, memory,
                        flags);
    if (note((uint64_t)(uintptr_t)memory, bytes, MEMORY_REGISTERED, flags) != 0)
        return complain(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
                        "%zu bytes at %p overlap memory that is registered", bytes, memory);
    return CUDA_SUCCESS;
}

/* Waits for nothing: what is queued and uses the memory will find it gone. */
ENTRY(NEEDS_CONTEXT, cuMemHostUnregister, 0, (void *memory), (memory)) {
    allocation **link;
    CUresult error = refused_by_capture();
    if (!error)
        error = find((uint64_t)(uintptr_t)memory, MEMORY_REGISTERED,
                     CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, &link);
    if (!error)
        forget(link);
    return error;
}

static const memory_range *range_of(uint64_t address) {
    const memory_range *found = memory_of_device(address);
    return found ? found : memory_of_host(address);
}

static CUresult find_range(uint64_t address, const memory_range **found) {
    *found = range_of(address);
    return *found ? CUDA_SUCCESS
                  : complain(CUDA_ERROR_INVALID_VALUE, "the driver does not know 0x%llx",
                             (unsigned long long)address);
}

ENTRY(NEEDS_CONTEXT, cuMemHostGetDevicePointer_v2, 0,
      (CUdeviceptr *device, void *memory, unsigned flags), (device, memory, flags)) {
    const memory_range *range;
    uint64_t address = (uint64_t)(uintptr_t)memory;
    if (flags)
        return complain(CUDA_ERROR_INVALID_VALUE, "flags are 0x%x", flags);
    range = memory_of_host(address);
    if (!range || range->kind == MEMORY_DEVICE)
        return complain(CUDA_ERROR_INVALID_VALUE, "%p is no registered host memory", memory);
    *device = range->device + (address - range->host);
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuMemHostGetFlags, 0, (unsigned *flags, void *memory), (flags, memory)) {
    const memory_range *range;
    CUresult error = find_range((uint64_t)(uintptr_t)memory, &range);
    if (!error)
        *flags = (*link_of(range->host))->flags;
    return error;
}

ENTRY(NEEDS_CONTEXT, cuMemGetAddressRange_v2, 0,
      (CUdeviceptr *base, size_t *bytes, CUdeviceptr address), (base, bytes, address)) {
    const memory_range *range;
    CUresult error = find_range(address, &range);
    if (error)
        return error;
    if (base)
        *base = range->device;
    if (bytes)
        *bytes = range->bytes;
    return CUDA_SUCCESS;
}

static CUresult pointer_attribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    const memory_range *range;
    CUresult error = find_range(address, &range);
    if (error)
        return error;
    const allocation *of = *link_of(range->host);
    bool by_device = memory_of_device(address) == range;
    uint64_t offset = address - (by_device ? range->device : range->host);
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
        *(CUcontext *)value = (CUcontext)context_of(of->ordinal);
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *(unsigned *)value =
            range->kind == MEMORY_DEVICE ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
        *(CUdeviceptr *)value = range->device + offset;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        if (range->kind == MEMORY_DEVICE)
            return complain(CUDA_ERROR_INVALID_VALUE, "device memory has no host address");
        *(uint64_t *)value = range->host + offset;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
        *(unsigned long long *)value = of->number;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
        *(unsigned *)value = 0;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        *(int *)value = of->ordinal;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
        *(CUdeviceptr *)value = range->device;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
        *(size_t *)value = range->bytes;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MAPPED:
        *(unsigned *)value = 1;
        return CUDA_SUCCESS;
    default:
        return complain(CUDA_ERROR_INVALID_VALUE, "attribute %d is not imitated", (int)attribute);
    }
}

ENTRY(NEEDS_CONTEXT, cuPointerGetAttribute, 0,
      (void *value, CUpointer_attribute attribute, CUdeviceptr address),
      (value, attribute, address)) {
    return pointer_attribute(value, attribute, address);
}
