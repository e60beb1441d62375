/* Gather and scatter of pages in CPU memory. What passes is added up on its way, as kernels/sums.py
 * says: that costs nothing beside the memory's time, so it is done whether or not it is asked for.
 *
 * host_pages.py fills the structs and calls; native.py compiles, with ROW_BYTES of kernels/table.py.
 * A loop over words is as fast as memcpy on few bytes, and a fifth faster on many, where memcpy
 * (glibc 2.36) takes "rep movsb"; what writes past the caches (movnt) was slower than either.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

enum { WORD_BYTES = 8, MAX_THREADS = 64 };

/* All sizes are bytes. */
struct tensor {
    char *pages;
    int64_t block_stride; /* between two pages */
    int64_t page_bytes;
    int64_t offset;       /* in a slot, of its first page */
    int64_t pitch;        /* in a slot, between two pages */
    int64_t first_row;
};

/* Block block_ids[i] lies in slot slot_ids[(first_block + i) / blocks_per_chunk], at position
 * (first_block + i) % blocks_per_chunk. */
struct move {
    const struct tensor *tensors;
    int64_t num_tensors;
    int64_t num_blocks; /* of each tensor */
    char *slots;
    int64_t slot_stride;
    int64_t num_slots;
    const int64_t *slot_ids;
    int64_t num_slot_ids;
    int64_t blocks_per_chunk;
    int64_t first_block;
    const int64_t *block_ids;
    int64_t count;
    _Atomic uint64_t *sums; /* [count], added to; or NULL */
    int64_t gathers;
    int64_t num_threads;
    int64_t step; /* pages of a tensor that a thread takes at once */
};

/* One call's, for all of its threads. */
struct work {
    const struct move *move;
    int64_t parts;        /* of each tensor */
    _Atomic int64_t next; /* the first part, tensor by tensor, that nobody has taken */
};

static uint64_t multiplier(int64_t row)
{
    uint64_t mixed = (uint64_t)(row + 1) * 0x9E3779B97F4A7C15u;
    return (mixed ^ mixed >> 32) | 1;
}

/* Copies words, and returns their sum. They may lie at any address. */
static inline uint64_t copy_words(char *restrict to, const char *restrict from, int64_t count)
{
    uint64_t sum = 0;
    for (int64_t i = 0; i < count; i++) {
        uint64_t word;
        memcpy(&word, from + WORD_BYTES * i, WORD_BYTES);
        memcpy(to + WORD_BYTES * i, &word, WORD_BYTES);
        sum += word;
    }
    return sum;
}

/* Copies a page, and returns what it adds to its block's sum. */
static uint64_t copy_page(char *restrict to, const char *restrict from, int64_t bytes, int64_t row)
{
    uint64_t sum = 0;
    for (; bytes >= ROW_BYTES; bytes -= ROW_BYTES, to += ROW_BYTES, from += ROW_BYTES)
        sum += multiplier(row++) * copy_words(to, from, ROW_BYTES / WORD_BYTES);
    if (bytes > 0) {
        int64_t words = bytes / WORD_BYTES;
        size_t begin = (size_t)(words * WORD_BYTES), rest = (size_t)bytes - begin;
        uint64_t last = 0; /* what is missing of it are zeros */
        memcpy(&last, from + begin, rest);
        memcpy(to + begin, &last, rest);
        sum += multiplier(row) * (copy_words(to, from, words) + last);
    }
    return sum;
}

/* The pages of one tensor of blocks [begin, end). */
static void copy_pages(const struct move *move, const struct tensor *tensor, int64_t begin,
                       int64_t end)
{
    int64_t chunk = (move->first_block + begin) / move->blocks_per_chunk;
    int64_t position = (move->first_block + begin) % move->blocks_per_chunk;
    for (int64_t i = begin; i < end; i++) {
        char *page = tensor->pages + move->block_ids[i] * tensor->block_stride;
        char *place = move->slots + move->slot_ids[chunk] * move->slot_stride + tensor->offset
                      + position * tensor->pitch;
        uint64_t sum = copy_page(move->gathers ? place : page, move->gathers ? page : place,
                                 tensor->page_bytes, tensor->first_row);
        if (move->sums)
            atomic_fetch_add_explicit(&move->sums[i], sum, memory_order_relaxed);
        if (++position == move->blocks_per_chunk) {
            position = 0;
            chunk++;
        }
    }
}

/* What each thread does: as long as there is a part, it takes one. */
static void *take_parts(void *argument)
{
    struct work *work = argument;
    const struct move *move = work->move;
    int64_t part;
    while ((part = atomic_fetch_add(&work->next, 1)) < move->num_tensors * work->parts) {
        int64_t begin = part % work->parts * move->step, end = begin + move->step;
        copy_pages(move, &move->tensors[part / work->parts], begin,
                   end < move->count ? end : move->count);
    }
    return NULL;
}

static int ids_are_valid(const struct move *move)
{
    int64_t first = move->first_block / move->blocks_per_chunk;
    int64_t last = (move->first_block + move->count - 1) / move->blocks_per_chunk;
    if (last >= move->num_slot_ids)
        return 0;
    for (int64_t i = first; i <= last; i++)
        if ((uint64_t)move->slot_ids[i] >= (uint64_t)move->num_slots)
            return 0;
    for (int64_t i = 0; i < move->count; i++)
        if ((uint64_t)move->block_ids[i] >= (uint64_t)move->num_blocks)
            return 0;
    return 1;
}

/* Returns 0, or 1 where an id is out of range; nothing is moved then. */
int move_pages(const struct move *move)
{
    if (!ids_are_valid(move))
        return 1;
    struct work work = {move, (move->count + move->step - 1) / move->step, 0};
    pthread_t threads[MAX_THREADS];
    int started = 0;
    while (started < MAX_THREADS && started < move->num_threads - 1
           && pthread_create(&threads[started], NULL, take_parts, &work) == 0)
        started++; /* where the system has no more threads, the others do it all */
    take_parts(&work);
    while (started > 0)
        pthread_join(threads[--started], NULL);
    return 0;
}
