/* Counts what a process holds on its heap in blocks of 4 KiB and more, and the most it held: tensors, workspaces, and
   nothing of Python's objects. Loaded with LD_PRELOAD; glibc. */
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

enum { SMALLEST = 4096 };
static atomic_llong now, peak;

static void count(void *block, int sign) {
    long long size = block ? (long long)malloc_usable_size(block) : 0;
    if (size < SMALLEST) return;
    long long total = atomic_fetch_add(&now, sign * size) + sign * size, most = atomic_load(&peak);
    while (total > most && !atomic_compare_exchange_weak(&peak, &most, total)) {}
}

long long heap_now(void) { return atomic_load(&now); }
long long heap_peak(void) { return atomic_load(&peak); }
void heap_reset(void) { atomic_store(&peak, atomic_load(&now)); }

void *malloc(size_t n) { void *block = __libc_malloc(n); count(block, 1); return block; }
void *calloc(size_t n, size_t m) { void *block = __libc_calloc(n, m); count(block, 1); return block; }
void free(void *block) { count(block, -1); __libc_free(block); }
void *realloc(void *old, size_t n) {
    count(old, -1);
    void *block = __libc_realloc(old, n);
    count(block ? block : n ? old : NULL, 1);
    return block;
}
void *memalign(size_t a, size_t n) { void *block = __libc_memalign(a, n); count(block, 1); return block; }
void *aligned_alloc(size_t a, size_t n) { return memalign(a, n); }
int posix_memalign(void **out, size_t a, size_t n) { *out = memalign(a, n); return *out ? 0 : ENOMEM; }
