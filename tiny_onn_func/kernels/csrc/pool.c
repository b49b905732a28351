/* The threads of the kernels: the entry points of GCC's OpenMP runtime that their pragmas call, with another way to wait.

   A region of OpenMP ends when every thread of its team has arrived, also one that has had nothing to do yet because another
   program has its core: then all wait for the scheduler, spinning, at every one of a step's hundred regions. Here work is
   taken in pieces by whoever is there, and a region ends when its pieces are done: a worker that comes too late finds it
   closed. Who waits spins for some microseconds and then sleeps, so that its core is free for the one that it waits for.

   The calling thread takes pieces from the front and workers from the back: in the next kernel each finds in its cache what it
   wrote in the last one. Regions are not nested, and one that begins while another thread's is open runs in its own thread.

   Only what the pragmas here need: `parallel`, `for schedule(dynamic)` in it, `reduction` and `atomic` of single words. The
   symbols are hidden: PyTorch's runtime stays its own. Where that spins for milliseconds, as it does by default, its threads
   would hold the cores that these need: then its own entry points are called, and all is as OpenMP has it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define HIDDEN __attribute__((visibility("hidden")))
#define MOST 256 /* workers */
#ifndef SPINS
#define SPINS 8000 /* looks at the gate before a worker sleeps */
#endif
#ifndef LAST_SPINS
#define LAST_SPINS 2000 /* looks at the workers before the caller sleeps */
#endif

typedef struct {
    void (*body)(void *);
    void *data;
    uint32_t wanted;        /* workers that may join */
    _Atomic int stage;      /* of its loop: 0 not begun, 1 being begun, 2 begun */
    _Atomic uint64_t left;  /* pieces: the first in the high half, behind the last in the low half */
    int64_t start, end, step, piece;
} Region;

/* generation << 32 | OPEN | workers inside */
#define OPEN 0x80000000u
static _Atomic uint64_t gate;
static Region *region; /* read by workers that are inside */
static _Atomic int busy, sleepers, is_waiting;
static int workers;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static __thread Region *own;
static __thread bool is_worker;

static inline void pause_a_moment(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline uint32_t inside(uint64_t state) { return (uint32_t)state & ~OPEN; }

/* Until another region has opened than that of `known`. */
static uint64_t next_region(uint32_t known) {
    for (int i = 0; i < SPINS; i++, pause_a_moment()) {
        uint64_t state = atomic_load(&gate);
        if ((uint32_t)(state >> 32) != known) return state;
    }
    pthread_mutex_lock(&mutex);
    atomic_fetch_add(&sleepers, 1);
    while ((uint32_t)(atomic_load(&gate) >> 32) == known) pthread_cond_wait(&work, &mutex);
    atomic_fetch_sub(&sleepers, 1);
    pthread_mutex_unlock(&mutex);
    return atomic_load(&gate);
}

static void *serve(void *known) {
    uint32_t generation = (uint32_t)(uintptr_t)known;
    is_worker = true;
    for (;;) {
        uint64_t state = next_region(generation);
        generation = (uint32_t)(state >> 32);
        /* joins while it is open; `region` is that of an open gate, and stays while somebody is inside */
        while ((state & OPEN) && (uint32_t)(state >> 32) == generation) {
            if (!atomic_compare_exchange_weak(&gate, &state, state + 1)) continue;
            if (inside(state) < region->wanted) {
                own = region;
                own->body(own->data);
            }
            state = atomic_fetch_sub(&gate, 1) - 1;
            if (!(state & OPEN) && !inside(state) && atomic_load(&is_waiting)) {
                pthread_mutex_lock(&mutex);
                pthread_cond_signal(&done);
                pthread_mutex_unlock(&mutex);
            }
            break;
        }
    }
    return NULL;
}

/* A child of `fork` has none of the threads. */
static void forget(void) {
    atomic_store(&gate, 0);
    atomic_store(&busy, 0);
    atomic_store(&sleepers, 0);
    atomic_store(&is_waiting, 0);
    workers = 0;
    pthread_mutex_init(&mutex, NULL);
    pthread_cond_init(&work, NULL);
    pthread_cond_init(&done, NULL);
}

typedef void Body(void *);
static struct {
    void (*parallel)(Body *, void *, unsigned, unsigned);
    void (*loop)(Body *, void *, unsigned, long, long, long, long, unsigned);
    bool (*start)(long, long, long, long, long *, long *), (*next)(long *, long *);
    void (*end)(void);
} theirs; /* of PyTorch's OpenMP, where that is used */

/* Whether PyTorch's threads wait without spinning for long; what its runtime read of the environment. */
static bool is_quiet(void) {
    const char *spins = getenv("GOMP_SPINCOUNT"), *policy = getenv("OMP_WAIT_POLICY");
    if (spins) return strtod(spins, NULL) <= 100000 && spins[strcspn(spins, "iI")] == 0;
    return policy && (policy[0] == 'p' || policy[0] == 'P');
}

__attribute__((constructor)) static void prepare(void) {
    pthread_atfork(NULL, NULL, forget);
    void *runtime = is_quiet() ? NULL : dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (!runtime) return;
    *(void **)&theirs.loop = dlsym(runtime, "GOMP_parallel_loop_nonmonotonic_dynamic");
    *(void **)&theirs.start = dlsym(runtime, "GOMP_loop_nonmonotonic_dynamic_start");
    *(void **)&theirs.next = dlsym(runtime, "GOMP_loop_nonmonotonic_dynamic_next");
    *(void **)&theirs.end = dlsym(runtime, "GOMP_loop_end_nowait");
    if (theirs.loop && theirs.start && theirs.next && theirs.end) *(void **)&theirs.parallel = dlsym(runtime, "GOMP_parallel");
}

/* At least so many workers, or as many as there can be. */
static void hire(int wanted) {
    if (wanted > MOST) wanted = MOST;
    pthread_attr_t detached;
    if (workers >= wanted || pthread_attr_init(&detached)) return;
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    while (workers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, &detached, serve, (void *)(uintptr_t)(atomic_load(&gate) >> 32))) break;
        workers++;
    }
    pthread_attr_destroy(&detached);
}

static void run(Region *now, uint32_t threads) {
    Region *outer = own;
    int is_free = 0;
    own = now;
    if (threads < 2 || is_worker || outer || !atomic_compare_exchange_strong(&busy, &is_free, 1)) {
        now->body(now->data);
        own = outer;
        return;
    }
    hire((int)threads - 1);
    now->wanted = threads - 1;
    region = now;
    uint64_t next = (((atomic_load(&gate) >> 32) + 1) & 0xffffffffu) << 32;
    atomic_store(&gate, next | OPEN);
    if (atomic_load(&sleepers)) {
        pthread_mutex_lock(&mutex);
        pthread_cond_broadcast(&work);
        pthread_mutex_unlock(&mutex);
    }
    now->body(now->data);
    uint64_t state = atomic_fetch_and(&gate, ~(uint64_t)OPEN);
    for (int i = 0; i < LAST_SPINS && inside(state); i++, pause_a_moment()) state = atomic_load(&gate);
    if (inside(atomic_load(&gate))) {
        pthread_mutex_lock(&mutex);
        atomic_store(&is_waiting, 1);
        while (inside(atomic_load(&gate))) pthread_cond_wait(&done, &mutex);
        atomic_store(&is_waiting, 0);
        pthread_mutex_unlock(&mutex);
    }
    own = outer;
    atomic_store(&busy, 0);
}

static void begin_loop(Region *now, int64_t start, int64_t end, int64_t step, int64_t piece) {
    int64_t count = start < end ? (end - start + step - 1) / step : 0;
    if (piece < 1) piece = 1;
    while ((count + piece - 1) / piece > INT32_MAX) piece *= 2;
    now->start = start, now->end = end, now->step = step, now->piece = piece;
    atomic_store(&now->left, (uint64_t)((count + piece - 1) / piece));
    atomic_store(&now->stage, 2);
}

/* The entry points; their names and arguments are GCC's (libgomp_g.h). */

HIDDEN void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
    if (theirs.parallel) {
        theirs.parallel(body, data, threads, flags);
        return;
    }
    Region now = {.body = body, .data = data};
    run(&now, threads);
}

HIDDEN void GOMP_parallel_loop_nonmonotonic_dynamic(void (*body)(void *), void *data, unsigned threads, long start, long end,
                                                    long step, long piece, unsigned flags) {
    if (theirs.parallel) {
        theirs.loop(body, data, threads, start, end, step, piece, flags);
        return;
    }
    Region now = {.body = body, .data = data};
    begin_loop(&now, start, end, step, piece);
    run(&now, threads);
}

HIDDEN bool GOMP_loop_nonmonotonic_dynamic_next(long *from, long *to) {
    if (theirs.parallel) return theirs.next(from, to);
    uint64_t left = atomic_load(&own->left), first, behind;
    do {
        first = left >> 32, behind = left & 0xffffffffu;
        if (first >= behind) return false;
    } while (!atomic_compare_exchange_weak(&own->left, &left, is_worker ? left - 1 : left + (1ull << 32)));
    int64_t at = (int64_t)(is_worker ? behind - 1 : first), length = own->step * own->piece;
    *from = own->start + at * length;
    *to = *from + length < own->end ? *from + length : own->end;
    return true;
}

HIDDEN bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long piece, long *from, long *to) {
    if (theirs.parallel) return theirs.start(start, end, step, piece, from, to);
    int none = 0;
    if (atomic_compare_exchange_strong(&own->stage, &none, 1)) begin_loop(own, start, end, step, piece);
    while (atomic_load(&own->stage) != 2) pause_a_moment();
    return GOMP_loop_nonmonotonic_dynamic_next(from, to);
}

HIDDEN void GOMP_loop_end_nowait(void) {
    if (theirs.parallel) theirs.end();
}

/* Whether regions run in the threads of this file. */
int has_own_threads(void) { return !theirs.parallel; }
