/* Copies and fills: what they may touch is checked at the call, and bytes move when they run. */

#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint64_t to, from; /* addresses as kernels know them, or pageable ones of the host */
    uint64_t rows, width, to_pitch, from_pitch;
    bool pageable_to, pageable_from;
    char *snapshot; /* the source as it was at the call; NULL: it is read in stream order */
} piece;

typedef struct {
    operation base;
    size_t count;
    piece pieces[]; /* in any order */
} copy;

/* -- at the call -- */

static uint64_t span(const piece *of, uint64_t pitch) { return (of->rows - 1) * pitch + of->width; }

/* An address of the host's becomes the device's own for it; memory that the driver does not know
   is pageable. All bytes must lie in one range, or in none. */
static CUresult resolve(uint64_t *address, uint64_t bytes, const char *side, bool *pageable) {
    const memory_range *range = memory_of_device(*address);
    if (!range && (range = memory_of_host(*address)))
        *address += range->device - range->host;
    *pageable = !range;
    if (!range)
        return reaches_known_memory(*address, bytes)
                   ? complain(CUDA_ERROR_INVALID_VALUE,
                              "the %s begins in pageable memory and ends in registered", side)
                   : CUDA_SUCCESS;
    uint64_t left = range->device + range->bytes - *address;
    if (bytes > left)
        return complain(CUDA_ERROR_INVALID_VALUE,
                        "the %s of %llu bytes leaves its memory, which ends after %llu", side,
                        (unsigned long long)bytes, (unsigned long long)left);
    return CUDA_SUCCESS;
}

static CUresult check_piece(piece *of) {
    CUresult error = resolve(&of->to, span(of, of->to_pitch), "destination", &of->pageable_to);
    return error ? error
                 : resolve(&of->from, span(of, of->from_pitch), "source", &of->pageable_from);
}

/* -- when it runs -- */

/* Where bytes are in this process; NULL where they are gone. `marks`: which were ever written;
   NULL: nobody keeps count. */
static char *locate(uint64_t address, uint64_t bytes, uint8_t **marks) {
    const memory_range *range = memory_of_device(address);
    if (!range || bytes > range->device + range->bytes - address)
        return NULL;
    uint64_t offset = address - range->device;
    *marks = range->written ? range->written + offset : NULL;
    return (char *)(uintptr_t)(range->host + offset);
}

/* What was never written may be copied: its copy was never written, either. */
static CUresult move_row(const piece *of, uint64_t row, char *why, size_t why_bytes) {
    uint64_t to = of->to + row * of->to_pitch, from = of->from + row * of->from_pitch;
    uint8_t *marks = NULL, *source_marks = NULL;
    char *target = (char *)(uintptr_t)to;
    const char *source = (const char *)(uintptr_t)from;
    if (of->snapshot)
        source = of->snapshot;
    else if (!of->pageable_from)
        source = locate(from, of->width, &source_marks);
    if (!of->pageable_to)
        target = locate(to, of->width, &marks);
    if (!source || !target) {
        snprintf(why, why_bytes, "the %s at 0x%llx is no longer the device's to reach",
                 source ? "destination" : "source", (unsigned long long)(source ? to : from));
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    memmove(target, source, of->width);
    if (marks && source_marks)
        memmove(marks, source_marks, of->width);
    else if (marks)
        memset(marks, 1, of->width);
    return CUDA_SUCCESS;
}

static CUresult run_copy(operation *self, char *why, size_t why_bytes) {
    copy *of = (copy *)self;
    for (size_t left = of->count; left > 0; left--) {
        size_t chosen = random_below(left);
        piece each = of->pieces[chosen];
        of->pieces[chosen] = of->pieces[left - 1];
        of->pieces[left - 1] = each;
        for (uint64_t row = 0; row < each.rows; row++) {
            CUresult error = move_row(&each, row, why, why_bytes);
            if (error)
                return error;
        }
    }
    return CUDA_SUCCESS;
}

static void discard_copy(operation *self) {
    copy *of = (copy *)self;
    for (size_t i = 0; i < of->count; i++)
        free(of->pieces[i].snapshot);
    free(of);
}

static copy *new_copy(size_t count) {
    copy *made = zeroed(sizeof *made + count * sizeof *made->pieces);
    made->base = (operation){.is_work = true, .run = run_copy, .discard = discard_copy};
    made->count = count;
    return made;
}

/* Pageable memory goes through the driver's own, and its submitter waits for that. */
static CUresult queue_copy(stream *on, copy *made) {
    bool pageable = false;
    for (size_t i = 0; i < made->count; i++)
        pageable |= made->pieces[i].pageable_to || made->pieces[i].pageable_from;
    if (pageable && is_capturing(on)) {
        discard_copy(&made->base);
        return refused_while_capturing(on);
    }
    CUresult error = enqueue(on, &made->base);
    if (error || !pageable)
        return error;
    note_pageable_copy();
    drain(on);
    return on->of->lost;
}

/* -- one after the other, and rows -- */

static CUresult copy_piece(piece wanted, CUstream handle) {
    stream *on;
    CUresult error = find_stream(handle, true, &on);
    if (error || wanted.rows == 0 || wanted.width == 0)
        return error;
    error = check_piece(&wanted);
    if (error)
        return error;
    copy *made = new_copy(1);
    made->pieces[0] = wanted;
    return queue_copy(on, made);
}

static CUresult copy_bytes(uint64_t to, uint64_t from, size_t bytes, CUstream on) {
    return copy_piece((piece){.to = to, .from = from, .rows = 1, .width = bytes}, on);
}

/* On the legacy stream, and done when it returns. */
static CUresult copy_now(uint64_t to, uint64_t from, size_t bytes) {
    CUresult error = refused_by_capture();
    if (!error)
        error = copy_bytes(to, from, bytes, CU_STREAM_LEGACY);
    if (error)
        return error;
    drain(current_context()->legacy);
    return current_context()->lost;
}

ENTRY(NEEDS_CONTEXT, cuMemcpyAsync, on,
      (CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream on), (to, from, bytes, on)) {
    return copy_bytes(to, from, bytes, on);
}

ENTRY(NEEDS_CONTEXT, cuMemcpyHtoDAsync_v2, on,
      (CUdeviceptr to, const void *from, size_t bytes, CUstream on), (to, from, bytes, on)) {
    return copy_bytes(to, (uint64_t)(uintptr_t)from, bytes, on);
}

ENTRY(NEEDS_CONTEXT, cuMemcpyDtoHAsync_v2, on,
      (void *to, CUdeviceptr from, size_t bytes, CUstream on), (to, from, bytes, on)) {
    return copy_bytes((uint64_t)(uintptr_t)to, from, bytes, on);
}

ENTRY(NEEDS_CONTEXT, cuMemcpyDtoDAsync_v2, on,
      (CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream on), (to, from, bytes, on)) {
    return copy_bytes(to, from, bytes, on);
}

ENTRY(NEEDS_CONTEXT, cuMemcpy, 0, (CUdeviceptr to, CUdeviceptr from, size_t bytes),
      (to, from, bytes)) {
    return copy_now(to, from, bytes);
}

ENTRY(NEEDS_CONTEXT, cuMemcpyHtoD_v2, 0, (CUdeviceptr to, const void *from, size_t bytes),
      (to, from, bytes)) {
    return copy_now(to, (uint64_t)(uintptr_t)from, bytes);
}

ENTRY(NEEDS_CONTEXT, cuMemcpyDtoH_v2, 0, (void *to, CUdeviceptr from, size_t bytes),
      (to, from, bytes)) {
    return copy_now((uint64_t)(uintptr_t)to, from, bytes);
}

static uint64_t side_address(CUmemorytype kind, const void *host, CUdeviceptr device) {
    return kind == CU_MEMORYTYPE_HOST ? (uint64_t)(uintptr_t)host : device;
}

ENTRY(NEEDS_CONTEXT, cuMemcpy2DAsync_v2, on, (const CUDA_MEMCPY2D *wanted, CUstream on),
      (wanted, on)) {
    if (wanted->srcMemoryType == CU_MEMORYTYPE_ARRAY ||
        wanted->dstMemoryType == CU_MEMORYTYPE_ARRAY)
        return complain(CUDA_ERROR_INVALID_VALUE, "arrays are not imitated");
    piece rows = {
        .to = side_address(wanted->dstMemoryType, wanted->dstHost, wanted->dstDevice),
        .from = side_address(wanted->srcMemoryType, wanted->srcHost, wanted->srcDevice),
        .rows = wanted->Height,
        .width = wanted->WidthInBytes,
        .to_pitch = wanted->dstPitch ? wanted->dstPitch : wanted->WidthInBytes,
        .from_pitch = wanted->srcPitch ? wanted->srcPitch : wanted->WidthInBytes,
    };
    if (rows.to_pitch < rows.width || rows.from_pitch < rows.width)
        return complain(CUDA_ERROR_INVALID_VALUE, "rows of %llu bytes at pitches of %llu and %llu",
                        (unsigned long long)rows.width, (unsigned long long)rows.to_pitch,
                        (unsigned long long)rows.from_pitch);
    rows.to += wanted->dstY * rows.to_pitch + wanted->dstXInBytes;
    rows.from += wanted->srcY * rows.from_pitch + wanted->srcXInBytes;
    return copy_piece(rows, on);
}

/* -- batches -- */

typedef struct {
    const CUdeviceptr *to, *from;
    const size_t *sizes;
    size_t count;
    const CUmemcpyAttributes *attributes;
    const size_t *first_entries; /* that each of the attributes is for */
    size_t num_attributes;
} batch;

static CUresult check_attributes(const batch *of) {
    if (of->count == 0 || of->num_attributes == 0 || of->num_attributes > of->count)
        return complain(CUDA_ERROR_INVALID_VALUE, "%zu entries with %zu attributes", of->count,
                        of->num_attributes);
    unsigned known = configuration.refuses_overlap_flag ? 0 : 1;
    for (size_t i = 0; i < of->num_attributes; i++) {
        const CUmemcpyAttributes *each = of->attributes + i;
        bool in_order = i == 0 ? of->first_entries[0] == 0
                               : of->first_entries[i] > of->first_entries[i - 1];
        if (!in_order || of->first_entries[i] >= of->count)
            return complain(CUDA_ERROR_INVALID_VALUE, "attributes %zu begin at entry %zu", i,
                            of->first_entries[i]);
        if (each->srcAccessOrder < CU_MEMCPY_SRC_ACCESS_ORDER_STREAM ||
            each->srcAccessOrder > CU_MEMCPY_SRC_ACCESS_ORDER_ANY)
            return complain(CUDA_ERROR_INVALID_VALUE, "a source access order of %d",
                            (int)each->srcAccessOrder);
        if (each->flags & ~known)
            return complain(CUDA_ERROR_INVALID_VALUE, "flags are 0x%x", each->flags);
    }
    return CUDA_SUCCESS;
}

/* Any order but the stream's allows to read at once, so that this does. */
static void take_snapshot(piece *of) {
    const memory_range *range = of->pageable_from ? NULL : memory_of_device(of->from);
    uint64_t source = range ? range->host + (of->from - range->device) : of->from;
    of->snapshot = zeroed(of->width);
    memcpy(of->snapshot, (const void *)(uintptr_t)source, of->width);
}

static CUresult fill_batch(copy *made, const batch *of, size_t *failed) {
    size_t attributes = 0;
    for (size_t i = 0; i < of->count; i++) {
        *failed = i;
        piece *each = &made->pieces[i];
        *each = (piece){.to = of->to[i], .from = of->from[i], .rows = 1, .width = of->sizes[i]};
        if (each->width == 0)
            return complain(CUDA_ERROR_INVALID_VALUE, "entry %zu has no bytes", i);
        CUresult error = check_piece(each);
        if (error)
            return error;
        while (attributes + 1 < of->num_attributes && of->first_entries[attributes + 1] <= i)
            attributes++;
        if (of->attributes[attributes].srcAccessOrder != CU_MEMCPY_SRC_ACCESS_ORDER_STREAM)
            take_snapshot(each);
    }
    return CUDA_SUCCESS;
}

static CUresult copy_batch(const batch *of, size_t *failed, CUstream handle) {
    *failed = SIZE_MAX;
    stream *on;
    CUresult error = find_stream(handle, true, &on);
    if (error)
        return error;
    if (on == on->of->legacy)
        return complain(CUDA_ERROR_INVALID_VALUE, "a batch on the legacy stream");
    if (is_capturing(on))
        return refused_while_capturing(on);
    error = check_attributes(of);
    if (error)
        return error;
    copy *made = new_copy(of->count);
    error = fill_batch(made, of, failed);
    if (error) {
        discard_copy(&made->base);
        return error;
    }
    *failed = SIZE_MAX;
    return queue_copy(on, made);
}

static CUresult refuse_older(int version) {
    if (configuration.driver_version >= version)
        return CUDA_SUCCESS;
    return complain(CUDA_ERROR_NOT_SUPPORTED, "this driver, %d, does not have it",
                    configuration.driver_version);
}

/* Of 12.8: tells which entry it refused. */
ENTRY(NEEDS_CONTEXT, cuMemcpyBatchAsync, on,
      (CUdeviceptr *to, CUdeviceptr *from, size_t *sizes, size_t count,
       CUmemcpyAttributes *attributes, size_t *first_entries, size_t num_attributes,
       size_t *failed, CUstream on),
      (to, from, sizes, count, attributes, first_entries, num_attributes, failed, on)) {
    CUresult error = refuse_older(12080);
    if (error)
        return error;
    size_t entry;
    batch wanted = {to, from, sizes, count, attributes, first_entries, num_attributes};
    error = copy_batch(&wanted, &entry, on);
    if (error && failed)
        *failed = entry;
    return error;
}

CUresult cuMemcpyBatchAsync_v2(CUdeviceptr *to, CUdeviceptr *from, size_t *sizes, size_t count,
                               CUmemcpyAttributes *attributes, size_t *first_entries,
                               size_t num_attributes, CUstream on);

/* Of 13.0. */
ENTRY(NEEDS_CONTEXT, cuMemcpyBatchAsync_v2, on,
      (CUdeviceptr *to, CUdeviceptr *from, size_t *sizes, size_t count,
       CUmemcpyAttributes *attributes, size_t *first_entries, size_t num_attributes, CUstream on),
      (to, from, sizes, count, attributes, first_entries, num_attributes, on)) {
    CUresult error = refuse_older(13000);
    if (error)
        return error;
    size_t entry;
    batch wanted = {to, from, sizes, count, attributes, first_entries, num_attributes};
    return copy_batch(&wanted, &entry, on);
}

/* -- fills -- */

typedef struct {
    operation base;
    int ordinal;
    uint64_t address, bytes;
    unsigned char value;
} fill;

static CUresult run_fill(operation *self, char *why, size_t why_bytes) {
    const fill *of = (const fill *)self;
    void *target =
        memory_reach(of->address, of->bytes, MEMORY_WRITE, of->ordinal, why, why_bytes);
    if (!target)
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    memset(target, of->value, of->bytes);
    return CUDA_SUCCESS;
}

static void discard_fill(operation *self) { free(self); }

ENTRY(NEEDS_CONTEXT, cuMemsetD8Async, on,
      (CUdeviceptr device, unsigned char value, size_t bytes, CUstream on),
      (device, value, bytes, on)) {
    stream *where;
    bool pageable;
    uint64_t address = device;
    CUresult error = find_stream(on, true, &where);
    if (error || bytes == 0)
        return error;
    error = resolve(&address, bytes, "destination", &pageable);
    if (error)
        return error;
    if (pageable)
        return complain(CUDA_ERROR_INVALID_VALUE, "0x%llx is no memory of the device's",
                        (unsigned long long)address);
    fill *made = zeroed(sizeof *made);
    *made = (fill){.base = {.is_work = true, .run = run_fill, .discard = discard_fill},
                   .ordinal = current_context()->ordinal,
                   .address = address,
                   .bytes = bytes,
                   .value = value};
    return enqueue(where, &made->base);
}
