/* Faults at the boundary of the C library: counts, logs and spoils the calls that change files below one folder.

   LD_PRELOAD this, then call arm(folder, number, mode, log) from the process: from then on the number-th changing call
   below `folder` (counted from 1; 0 spoils none) meets what `mode` says, and every call is appended to the file `log`
   (if not empty) as a binary record: kind, three lengths, two paths, the data written. Paths that hold "/tensorboard/"
   are left alone unless the mode has TENSORBOARD added, and then only they count. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, FAIL_EIO, FAIL_ENOSPC, SHORT_WRITE, TORN_WRITE, DIE_BEFORE, DIE_AFTER, DISK_FULL, TENSORBOARD = 100 };

static char root[PATH_MAX];
static long target, count;
static int mode, only_tensorboard, logger = -1;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

void arm(const char *folder, long number, int what, const char *log) {
    snprintf(root, sizeof root, "%s", folder);
    only_tensorboard = what >= TENSORBOARD;
    mode = what % TENSORBOARD;
    target = number;
    count = 0;
    logger = *log ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
}

long counted(void) { return count; }

static int below(const char *path) {
    size_t length = strlen(root);
    if (!length || strncmp(path, root, length) || (path[length] && path[length] != '/')) return 0;
    return only_tensorboard == (strstr(path, "/tensorboard/") != NULL);
}

static void absolute(int folder, const char *path, char *out) {
    char base[PATH_MAX] = "", link[64];
    if (path[0] != '/') {
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) base[0] = 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t n = readlink(link, base, sizeof base - 1);
            base[n > 0 ? n : 0] = 0;
        }
        strncat(base, "/", sizeof base - strlen(base) - 1);
    }
    snprintf(out, PATH_MAX, "%s%s", base, path);
}

static int named(int descriptor, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    out[n > 0 ? n : 0] = 0;
    return n > 0 && below(out);
}

static void note(char kind, const char *path, const char *other, const void *data, size_t length) {
    if (logger < 0) return;
    uint32_t head[4] = {(uint32_t)kind, (uint32_t)strlen(path), (uint32_t)strlen(other), (uint32_t)length};
    struct iovec parts[4] = {{head, sizeof head}, {(void *)path, head[1]}, {(void *)other, head[2]}, {(void *)data, length}};
    syscall(SYS_writev, logger, parts, 4);
}

/* What to do with this call: 0 let it be, 1 fail (errno is set), 2 write half, 3 write half and die, 4 die afterwards. */
static int verdict(int grows) {
    long now = ++count;
    if (mode == DISK_FULL && target && now >= target && grows) { errno = ENOSPC; return 1; }
    if (!target || now != target) return 0;
    switch (mode) {
    case FAIL_EIO: errno = EIO; return 1;
    case FAIL_ENOSPC: errno = ENOSPC; return 1;
    case SHORT_WRITE: return 2;
    case TORN_WRITE: return 3;
    case DIE_BEFORE: _exit(137);
    case DIE_AFTER: return 4;
    }
    return 0;
}

#define CALL(grows, result, kind, path, other, data, length)     \
    pthread_mutex_lock(&guard);                                   \
    int what = verdict(grows);                                    \
    long answer = -1;                                             \
    if (what != 1) {                                              \
        answer = (result);                                        \
        if (answer >= 0) note(kind, path, other, data, length);   \
    }                                                             \
    int saved = errno;                                            \
    if (what == 3 || what == 4) _exit(137);                       \
    pthread_mutex_unlock(&guard);                                 \
    errno = saved;                                                \
    return answer;

#define WRITING (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)

static int opened(int folder, const char *path, int flags, mode_t rights) {
    char full[PATH_MAX];
    absolute(folder, path, full);
    if (!(flags & WRITING) || !below(full)) return (int)syscall(SYS_openat, folder, path, flags, rights);
    CALL(1, syscall(SYS_openat, folder, path, flags, rights), flags & O_TRUNC ? 'T' : 'O', full, "", "", 0)
}

#define RIGHTS(last)                                        \
    mode_t rights = 0;                                      \
    if (flags & (O_CREAT | O_TMPFILE)) {                    \
        va_list list;                                       \
        va_start(list, last);                               \
        rights = va_arg(list, mode_t);                      \
        va_end(list);                                       \
    }

int open(const char *path, int flags, ...) { RIGHTS(flags) return opened(AT_FDCWD, path, flags, rights); }
int open64(const char *path, int flags, ...) { RIGHTS(flags) return opened(AT_FDCWD, path, flags, rights); }
int openat(int folder, const char *path, int flags, ...) { RIGHTS(flags) return opened(folder, path, flags, rights); }
int openat64(int folder, const char *path, int flags, ...) { RIGHTS(flags) return opened(folder, path, flags, rights); }

ssize_t write(int descriptor, const void *data, size_t length) {
    char full[PATH_MAX];
    if (!named(descriptor, full)) return syscall(SYS_write, descriptor, data, length);
    CALL(1, syscall(SYS_write, descriptor, data, what >= 2 && what < 4 && length > 1 ? length / 2 : length), 'W', full, "",
         data, (size_t)answer)
}

static ssize_t placed(int descriptor, const void *data, size_t length, off_t at) {
    char full[PATH_MAX];
    if (!named(descriptor, full)) return syscall(SYS_pwrite64, descriptor, data, length, at);
    CALL(1, syscall(SYS_pwrite64, descriptor, data, what >= 2 && what < 4 && length > 1 ? length / 2 : length, at), '?',
         full, "", "", 0)
}

ssize_t pwrite(int descriptor, const void *data, size_t length, off_t at) { return placed(descriptor, data, length, at); }
ssize_t pwrite64(int descriptor, const void *data, size_t length, off64_t at) { return placed(descriptor, data, length, at); }

ssize_t writev(int descriptor, const struct iovec *parts, int number) {
    char full[PATH_MAX];
    if (!named(descriptor, full)) return syscall(SYS_writev, descriptor, parts, number);
    ssize_t total = 0;
    for (int i = 0; i < number; i++) {
        ssize_t done = write(descriptor, parts[i].iov_base, parts[i].iov_len);
        if (done < 0) return total ? total : done;
        total += done;
        if ((size_t)done < parts[i].iov_len) break;
    }
    return total;
}

static int moved(int from, const char *old, int to, const char *new) {
    char source[PATH_MAX], goal[PATH_MAX];
    absolute(from, old, source);
    absolute(to, new, goal);
    if (!below(source) && !below(goal)) return (int)syscall(SYS_renameat2, from, old, to, new, 0);
    CALL(0, syscall(SYS_renameat2, from, old, to, new, 0), 'R', source, goal, "", 0)
}

int rename(const char *old, const char *new) { return moved(AT_FDCWD, old, AT_FDCWD, new); }
int renameat(int from, const char *old, int to, const char *new) { return moved(from, old, to, new); }

static int synced(int descriptor) {
    char full[PATH_MAX];
    if (!named(descriptor, full)) return (int)syscall(SYS_fsync, descriptor);
    CALL(1, syscall(SYS_fsync, descriptor), 'S', full, "", "", 0)
}

int fsync(int descriptor) { return synced(descriptor); }
int fdatasync(int descriptor) { return synced(descriptor); }

int ftruncate(int descriptor, off_t length) {
    char full[PATH_MAX];
    if (!named(descriptor, full)) return (int)syscall(SYS_ftruncate, descriptor, length);
    CALL(1, syscall(SYS_ftruncate, descriptor, length), 'L', full, "", &length, sizeof length)
}
int ftruncate64(int descriptor, off64_t length) { return ftruncate(descriptor, length); }

static int made(int folder, const char *path, mode_t rights) {
    char full[PATH_MAX];
    absolute(folder, path, full);
    if (!below(full)) return (int)syscall(SYS_mkdirat, folder, path, rights);
    CALL(1, syscall(SYS_mkdirat, folder, path, rights), 'M', full, "", "", 0)
}

int mkdir(const char *path, mode_t rights) { return made(AT_FDCWD, path, rights); }
int mkdirat(int folder, const char *path, mode_t rights) { return made(folder, path, rights); }

static int removed(int folder, const char *path, int flags) {
    char full[PATH_MAX];
    absolute(folder, path, full);
    if (!below(full)) return (int)syscall(SYS_unlinkat, folder, path, flags);
    CALL(0, syscall(SYS_unlinkat, folder, path, flags), 'U', full, "", "", 0)
}

int unlink(const char *path) { return removed(AT_FDCWD, path, 0); }
int unlinkat(int folder, const char *path, int flags) { return removed(folder, path, flags); }
int rmdir(const char *path) { return removed(AT_FDCWD, path, AT_REMOVEDIR); }
