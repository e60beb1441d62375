/* The memory that an imitated card can reach, and which bytes of it were ever written. */
#ifndef CARD_MEMORY_H
#define CARD_MEMORY_H

#include <stddef.h>
#include <stdint.h>

typedef enum { MEMORY_DEVICE, MEMORY_PINNED, MEMORY_REGISTERED } memory_kind;

typedef struct {
    uint64_t host;   /* where the bytes are in truth, in this process */
    uint64_t device; /* the address that kernels know them by: another on WSL2 */
    uint64_t bytes;
    memory_kind kind;
    int ordinal;     /* of the card that it lies on, or was registered with; -1: of every card */
    uint8_t *written; /* one for each byte; NULL: all are */
} memory_range;

typedef enum { MEMORY_READ, MEMORY_WRITE } memory_access;

/* All are called under one lock of the driver's, and none locks. */

/* 0, or -1 where the range overlaps one that is there. `tracked`: no byte was written yet. */
int memory_add(memory_range range, int tracked);
/* The range that begins at this address of the host; 0, or -1 where there is none. */
int memory_remove(uint64_t host);
/* The range that has this address, as kernels know it, or as the host does; NULL: none. */
const memory_range *memory_of_device(uint64_t device);
const memory_range *memory_of_host(uint64_t host);
/* Where `bytes` bytes at this device address are in this process. NULL, with the reason in `why`,
   where one of them is in no range, or is read though nothing ever wrote it. A write marks them. */
void *memory_reach(uint64_t device, uint64_t bytes, memory_access access, int ordinal, char *why,
                   size_t why_bytes);
/* Say that the host wrote these bytes. */
void memory_mark_written(uint64_t host, uint64_t bytes);

#endif
