/* See memory.h. Ranges lie in two arrays, in order of their addresses on either side. */

#include "memory.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    memory_range **ranges;
    size_t count, capacity;
    size_t address_offset; /* of the field that they are ordered by */
} ordering;

static ordering by_device = {.address_offset = offsetof(memory_range, device)};
static ordering by_host = {.address_offset = offsetof(memory_range, host)};

static uint64_t address_of(const ordering *order, const memory_range *range) {
    return *(const uint64_t *)((const char *)range + order->address_offset);
}

/* How many ranges begin at this address or before it. */
static size_t ranges_up_to(const ordering *order, uint64_t address) {
    size_t low = 0, high = order->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (address_of(order, order->ranges[middle]) <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static memory_range *range_with(const ordering *order, uint64_t address) {
    size_t index = ranges_up_to(order, address);
    if (index == 0)
        return NULL;
    memory_range *range = order->ranges[index - 1];
    return address - address_of(order, range) < range->bytes ? range : NULL;
}

static int overlaps(const ordering *order, uint64_t address, uint64_t bytes) {
    /* The last that begins before the end is the one that may reach into it. */
    size_t index = ranges_up_to(order, address + bytes - 1);
    if (index == 0)
        return 0;
    const memory_range *range = order->ranges[index - 1];
    return address_of(order, range) + range->bytes > address;
}

static int insert(ordering *order, memory_range *range) {
    if (order->count == order->capacity) {
        size_t capacity = order->capacity ? 2 * order->capacity : 64;
        memory_range **grown = realloc(order->ranges, capacity * sizeof *grown);
        if (!grown)
            return -1;
        order->ranges = grown;
        order->capacity = capacity;
    }
    size_t index = ranges_up_to(order, address_of(order, range));
    memmove(order->ranges + index + 1, order->ranges + index,
            (order->count - index) * sizeof *order->ranges);
    order->ranges[index] = range;
    order->count++;
    return 0;
}

static void take_out(ordering *order, const memory_range *range) {
    size_t index = ranges_up_to(order, address_of(order, range)) - 1;
    order->count--;
    memmove(order->ranges + index, order->ranges + index + 1,
            (order->count - index) * sizeof *order->ranges);
}

int memory_add(memory_range range, int tracked) {
    if (range.bytes == 0 || overlaps(&by_device, range.device, range.bytes) ||
        overlaps(&by_host, range.host, range.bytes))
        return -1;
    memory_range *kept = malloc(sizeof *kept);
    if (!kept)
        return -1;
    *kept = range;
    kept->written = tracked ? calloc(range.bytes, 1) : NULL;
    if ((!tracked || kept->written) && insert(&by_device, kept) == 0) {
        if (insert(&by_host, kept) == 0)
            return 0;
        take_out(&by_device, kept);
    }
    free(kept->written);
    free(kept);
    return -1;
}

int memory_remove(uint64_t host) {
    memory_range *range = range_with(&by_host, host);
    if (!range || range->host != host)
        return -1;
    take_out(&by_device, range);
    take_out(&by_host, range);
    free(range->written);
    free(range);
    return 0;
}

const memory_range *memory_of_device(uint64_t device) { return range_with(&by_device, device); }

const memory_range *memory_of_host(uint64_t host) { return range_with(&by_host, host); }

static const char *name_of(memory_kind kind) {
    switch (kind) {
    case MEMORY_DEVICE:
        return "device memory";
    case MEMORY_PINNED:
        return "pinned memory";
    default:
        return "registered memory";
    }
}

static void *refuse(char *why, size_t why_bytes, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(why, why_bytes, format, values);
    va_end(values);
    return NULL;
}

/* The range that ends or begins nearest to an address that is in none. */
static void *refuse_outside(uint64_t device, uint64_t bytes, char *why, size_t why_bytes) {
    size_t index = ranges_up_to(&by_device, device);
    const memory_range *before = index ? by_device.ranges[index - 1] : NULL;
    const memory_range *after = index < by_device.count ? by_device.ranges[index] : NULL;
    if (!before && !after)
        return refuse(why, why_bytes, "%llu bytes at 0x%llx are in no range: there is none",
                      (unsigned long long)bytes, (unsigned long long)device);
    uint64_t behind = before ? device - (before->device + before->bytes) : UINT64_MAX;
    uint64_t ahead = after ? after->device - device : UINT64_MAX;
    const memory_range *nearest = behind <= ahead ? before : after;
    return refuse(why, why_bytes,
                  "%llu bytes at 0x%llx are in no range: %llu bytes %s [0x%llx, 0x%llx) of %s",
                  (unsigned long long)bytes, (unsigned long long)device,
                  (unsigned long long)(nearest == before ? behind : ahead),
                  nearest == before ? "behind" : "before", (unsigned long long)nearest->device,
                  (unsigned long long)(nearest->device + nearest->bytes), name_of(nearest->kind));
}

void *memory_reach(uint64_t device, uint64_t bytes, memory_access access, int ordinal, char *why,
                   size_t why_bytes) {
    memory_range *range = range_with(&by_device, device);
    if (!range)
        return refuse_outside(device, bytes, why, why_bytes);
    uint64_t offset = device - range->device;
    if (bytes > range->bytes - offset)
        return refuse(why, why_bytes,
                      "%llu bytes at 0x%llx reach past the end of [0x%llx, 0x%llx) of %s",
                      (unsigned long long)bytes, (unsigned long long)device,
                      (unsigned long long)range->device,
                      (unsigned long long)(range->device + range->bytes), name_of(range->kind));
    if (range->ordinal >= 0 && range->ordinal != ordinal)
        return refuse(why, why_bytes, "0x%llx is %s of device %d, not of device %d",
                      (unsigned long long)device, name_of(range->kind), range->ordinal, ordinal);
    if (range->written && access == MEMORY_READ) {
        const uint8_t *unwritten = memchr(range->written + offset, 0, bytes);
        if (unwritten)
            return refuse(why, why_bytes,
                          "the byte at 0x%llx of [0x%llx, 0x%llx) was never written",
                          (unsigned long long)(range->device + (unwritten - range->written)),
                          (unsigned long long)range->device,
                          (unsigned long long)(range->device + range->bytes));
    }
    if (range->written && access == MEMORY_WRITE)
        memset(range->written + offset, 1, bytes);
    return (void *)(uintptr_t)(range->host + offset);
}

void memory_mark_written(uint64_t host, uint64_t bytes) {
    while (bytes > 0) {
        memory_range *range = range_with(&by_host, host);
        if (!range)
            return;
        uint64_t offset = host - range->host;
        uint64_t here = bytes < range->bytes - offset ? bytes : range->bytes - offset;
        if (range->written)
            memset(range->written + offset, 1, here);
        host += here;
        bytes -= here;
    }
}
