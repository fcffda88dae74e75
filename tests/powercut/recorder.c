/* Records what a program does to the files below one directory: see recorder.py, which compiles, starts and reads this.
 *
 * Preloaded, it stands before the calls of libc that change files. Each that succeeds on something below RECORDER_ROOT
 * becomes one record in RECORDER_LOG, under one mutex with the call itself, so that the order of the records is the
 * order of the calls. Which file a descriptor means is asked of the kernel each time: there is no table that dup,
 * fork, close or a rename could make wrong. For the same reason the log is opened anew for each record.
 */

#undef _FORTIFY_SOURCE /* its inline open() would be in the way of ours */
#undef _FILE_OFFSET_BITS
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

_Static_assert(sizeof(off_t) == 8, "open and open64 are taken to be one");

static char root[PATH_MAX]; /* "" when nothing is to be recorded */
static char marks[PATH_MAX + 8];
static char log_path[PATH_MAX];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static void lock(void) { pthread_mutex_lock(&mutex); }
static void unlock(void) { pthread_mutex_unlock(&mutex); }

__attribute__((noreturn)) static void fail(const char *what) {
    dprintf(2, "recorder: %s: %s\n", what, strerror(errno));
    abort(); /* a gap in the log would make a good program look bad, or a bad one good */
}

static void set_up(void) {
    static int done;
    if (done) return;
    done = 1;
    const char *r = getenv("RECORDER_ROOT"), *l = getenv("RECORDER_LOG");
    if (!r || !l || strlen(r) >= sizeof root || strlen(l) >= sizeof log_path) return;
    strcpy(log_path, l);
    strcpy(marks, r);
    strcat(marks, ".marks");
    strcpy(root, r);
}

__attribute__((constructor)) static void loaded(void) {
    set_up();
    pthread_atfork(lock, unlock, unlock);
}

/* The original of a call. */
#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real && !(real = (__typeof__(&name))dlsym(RTLD_NEXT, #name))) fail("dlsym " #name)

static int real_openat(int dir, const char *path, int flags, mode_t mode) {
    REAL(openat);
    return real(dir, path, flags, mode);
}
static ssize_t real_writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    return real(fd, parts, count);
}
static int real_close(int fd) {
    REAL(close);
    return real(fd);
}

/* One record: kind, number, length of a, length of b, a, b. */
static void record(char kind, uint64_t number, const char *a, const void *b, size_t b_size) {
    char head[17];
    uint32_t sizes[2] = {(uint32_t)strlen(a), (uint32_t)b_size};
    head[0] = kind;
    memcpy(head + 1, &number, 8);
    memcpy(head + 9, sizes, 8);
    struct iovec parts[3] = {{head, sizeof head}, {(void *)a, sizes[0]}, {(void *)b, b_size}};
    int fd = real_openat(AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0) fail("opening the log");
    if (real_writev(fd, parts, 3) != (ssize_t)(sizeof head + sizes[0] + b_size)) fail("writing the log");
    real_close(fd);
}

static void record_unknown(const char *call, const char *path) { record('X', 0, path, call, strlen(call)); }

/* The path seen from the root, "." for the root itself, or NULL for what is not recorded. */
static const char *inside(const char *path) {
    size_t n = strlen(root), size = strlen(path);
    if (!n || strncmp(path, root, n)) return NULL;
    if (!path[n]) return ".";
    if (path[n] != '/') return NULL;
    if (size > 4 && !strcmp(path + size - 4, "-shm")) return NULL;
    return path + n + 1;
}

struct place {
    char path[PATH_MAX + 16];
    const char *name; /* seen from the root */
    struct stat stat;
    int is_marks, is_directory;
};

/* Whether what the descriptor means is recorded. A file without a name is not: no cut leaves any of it. */
static int find(int fd, struct place *p) {
    char link[40];
    int saved = errno, found = 0;
    set_up();
    if (!root[0] || fd < 0 || fstat(fd, &p->stat)) goto end;
    p->is_directory = S_ISDIR(p->stat.st_mode);
    if ((!p->is_directory && !S_ISREG(p->stat.st_mode)) || !p->stat.st_nlink) goto end;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, p->path, PATH_MAX);
    if (n <= 0 || n >= PATH_MAX) goto end;
    p->path[n] = 0;
    p->is_marks = !strcmp(p->path, marks);
    p->name = p->is_marks ? p->path : inside(p->path);
    found = p->name != NULL;
end:
    errno = saved;
    return found;
}

/* The same for a path, which need not exist: its folder is resolved, and with `follow` its last part too. */
static const char *resolve(int dir, const char *path, int follow, char out[PATH_MAX * 2]) {
    char full[PATH_MAX * 2], link[40];
    const char *name = NULL;
    int saved = errno;
    set_up();
    if (!root[0] || !path || !*path || strlen(path) >= PATH_MAX) goto end;
    full[0] = 0;
    if (path[0] != '/') {
        if (dir == AT_FDCWD) {
            if (!getcwd(full, PATH_MAX)) goto end;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t n = readlink(link, full, PATH_MAX - 1);
            if (n <= 0) goto end;
            full[n] = 0;
        }
        strcat(full, "/");
    }
    strcat(full, path);
    if (follow && realpath(full, out)) {
        name = inside(out);
        goto end;
    }
    size_t n = strlen(full);
    while (n > 1 && full[n - 1] == '/') full[--n] = 0;
    char *last = strrchr(full, '/');
    *last++ = 0;
    if (!realpath(full[0] ? full : "/", out)) goto end;
    if (strcmp(out, "/")) strcat(out, "/");
    strcat(out, last);
    name = inside(out);
end:
    errno = saved;
    return name;
}

/* Opening ---------------------------------------------------------------------------------------------------------- */

static int recorded_open(int dir, const char *path, int flags, mode_t mode) {
    char buffer[PATH_MAX * 2];
    struct place p;
    struct stat before;
    if (!(flags & (O_CREAT | O_TRUNC)) || !resolve(dir, path, !(flags & O_NOFOLLOW), buffer))
        return real_openat(dir, path, flags, mode);
    lock();
    int saved = errno, was_there = !fstatat(dir, path, &before, 0);
    errno = saved;
    int fd = real_openat(dir, path, flags, mode);
    if (fd >= 0 && find(fd, &p) && !p.is_directory) {
        if (!was_there)
            record('C', 0, p.name, NULL, 0);
        else if ((flags & O_TRUNC) && before.st_size)
            record('T', 0, p.name, NULL, 0);
    }
    unlock();
    return fd;
}

#define MODE \
    mode_t mode = 0; \
    if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *path, int flags, ...) {
    MODE return recorded_open(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE return recorded_open(AT_FDCWD, path, flags, mode);
}
int openat(int dir, const char *path, int flags, ...) {
    MODE return recorded_open(dir, path, flags, mode);
}
int openat64(int dir, const char *path, int flags, ...) {
    MODE return recorded_open(dir, path, flags, mode);
}
int creat(const char *path, mode_t mode) { return recorded_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }
/* What the fortified headers call where no mode is given. */
int __open_2(const char *path, int flags) { return recorded_open(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return recorded_open(AT_FDCWD, path, flags, 0); }
int __openat_2(int dir, const char *path, int flags) { return recorded_open(dir, path, flags, 0); }
int __openat64_2(int dir, const char *path, int flags) { return recorded_open(dir, path, flags, 0); }

/* Writing ---------------------------------------------------------------------------------------------------------- */

/* After a write of `size` bytes at `offset`, or at the descriptor's own position when that is -1. */
static void wrote(int fd, const struct place *p, const void *data, ssize_t size, off_t offset) {
    if (size <= 0) return;
    if (p->is_marks) {
        record('K', 0, "", data, (size_t)size);
        return;
    }
    int flags = fcntl(fd, F_GETFL);
    if (offset == -1) {
        offset = lseek(fd, 0, SEEK_CUR) - size;
    } else if (flags & O_APPEND) { /* Linux: pwrite appends then, whatever its offset */
        struct stat now;
        if (fstat(fd, &now)) fail("fstat");
        offset = now.st_size - size;
    }
    record('W', (uint64_t)offset, p->name, data, (size_t)size);
    if (flags & O_DSYNC) record('S', 0, p->name, NULL, 0); /* O_SYNC has its bit too */
}

static void wrote_parts(int fd, const struct place *p, const struct iovec *parts, ssize_t size, off_t offset) {
    if (size <= 0) return;
    char *data = malloc((size_t)size);
    if (!data) fail("malloc");
    for (size_t done = 0; done < (size_t)size; parts++) {
        size_t n = parts->iov_len < (size_t)size - done ? parts->iov_len : (size_t)size - done;
        memcpy(data + done, parts->iov_base, n);
        done += n;
    }
    wrote(fd, p, data, size, offset);
    free(data);
}

/* Calls the original, recorded by `then` if `fd` is recorded: found again under the mutex, it may have been renamed. */
#define RECORDED(type, call, then) \
    struct place p; \
    if (!find(fd, &p)) return call; \
    lock(); \
    int found = find(fd, &p); \
    type result = call; \
    if (found) { \
        int saved = errno; \
        then; \
        errno = saved; \
    } \
    unlock(); \
    return result

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    RECORDED(ssize_t, real(fd, data, n), wrote(fd, &p, data, result, -1));
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    REAL(pwrite);
    RECORDED(ssize_t, real(fd, data, n, at), wrote(fd, &p, data, result, at));
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    REAL(pwrite64);
    RECORDED(ssize_t, real(fd, data, n, at), wrote(fd, &p, data, result, at));
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    RECORDED(ssize_t, real(fd, parts, count), wrote_parts(fd, &p, parts, result, -1));
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
    REAL(pwritev);
    RECORDED(ssize_t, real(fd, parts, count, at), wrote_parts(fd, &p, parts, result, at));
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t at) {
    REAL(pwritev64);
    RECORDED(ssize_t, real(fd, parts, count, at), wrote_parts(fd, &p, parts, result, at));
}
static void wrote_flagged(int fd, struct place *p, const struct iovec *parts, ssize_t size, off_t at, int flags) {
    if (flags && size > 0)
        record_unknown("pwritev2", p->name);
    else
        wrote_parts(fd, p, parts, size, at);
}
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
    REAL(pwritev2);
    RECORDED(ssize_t, real(fd, parts, count, at, flags), wrote_flagged(fd, &p, parts, result, at, flags));
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t at, int flags) {
    REAL(pwritev64v2);
    RECORDED(ssize_t, real(fd, parts, count, at, flags), wrote_flagged(fd, &p, parts, result, at, flags));
}

/* Sizes ------------------------------------------------------------------------------------------------------------ */

static void resized(struct place *p, int result, off_t size) {
    if (!result && !p->is_marks) record('T', (uint64_t)size, p->name, NULL, 0);
}
int ftruncate(int fd, off_t size) {
    REAL(ftruncate);
    RECORDED(int, real(fd, size), resized(&p, result, size));
}
int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    RECORDED(int, real(fd, size), resized(&p, result, size));
}
int truncate(const char *path, off_t size) {
    REAL(truncate);
    char buffer[PATH_MAX * 2];
    const char *name = resolve(AT_FDCWD, path, 1, buffer);
    if (!name) return real(path, size);
    lock();
    int result = real(path, size);
    if (!result) record('T', (uint64_t)size, name, NULL, 0);
    unlock();
    return result;
}
int truncate64(const char *path, off64_t size) { return truncate(path, size); }

/* Room that was asked for is seen only by the file having grown. */
static void allocated(int fd, struct place *p, int result, int mode) {
    struct stat now;
    if (result || p->is_marks) return;
    if (mode & ~FALLOC_FL_KEEP_SIZE)
        record_unknown("fallocate", p->name);
    else if (!fstat(fd, &now) && now.st_size != p->stat.st_size)
        record('T', (uint64_t)now.st_size, p->name, NULL, 0);
}
int fallocate(int fd, int mode, off_t at, off_t n) {
    REAL(fallocate);
    RECORDED(int, real(fd, mode, at, n), allocated(fd, &p, result, mode));
}
int fallocate64(int fd, int mode, off64_t at, off64_t n) {
    REAL(fallocate64);
    RECORDED(int, real(fd, mode, at, n), allocated(fd, &p, result, mode));
}
int posix_fallocate(int fd, off_t at, off_t n) {
    REAL(posix_fallocate);
    RECORDED(int, real(fd, at, n), allocated(fd, &p, result, 0));
}
int posix_fallocate64(int fd, off64_t at, off64_t n) {
    REAL(posix_fallocate64);
    RECORDED(int, real(fd, at, n), allocated(fd, &p, result, 0));
}

/* Syncing ---------------------------------------------------------------------------------------------------------- */

static void synced(struct place *p, int result) {
    if (!result && !p->is_marks) record(p->is_directory ? 'D' : 'S', 0, p->name, NULL, 0);
}
int fsync(int fd) {
    REAL(fsync);
    RECORDED(int, real(fd), synced(&p, result));
}
int fdatasync(int fd) {
    REAL(fdatasync);
    RECORDED(int, real(fd), synced(&p, result));
}

/* Names ------------------------------------------------------------------------------------------------------------ */

int unlinkat(int dir, const char *path, int flags) {
    REAL(unlinkat);
    char buffer[PATH_MAX * 2];
    const char *name = resolve(dir, path, 0, buffer);
    if (!name) return real(dir, path, flags);
    lock();
    int result = real(dir, path, flags);
    if (!result) record('U', 0, name, NULL, 0);
    unlock();
    return result;
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path) {
    int result = unlink(path);
    return result && errno == EISDIR ? rmdir(path) : result;
}

static int recorded_rename(int old_dir, const char *old, int new_dir, const char *new, unsigned flags) {
    REAL(renameat2);
    char old_buffer[PATH_MAX * 2], new_buffer[PATH_MAX * 2];
    const char *from = resolve(old_dir, old, 0, old_buffer), *to = resolve(new_dir, new, 0, new_buffer);
    if (!from && !to) return real(old_dir, old, new_dir, new, flags);
    lock();
    int result = real(old_dir, old, new_dir, new, flags);
    if (!result) {
        if (!from || !to || (flags & ~RENAME_NOREPLACE)) /* across the border, or an exchange */
            record_unknown("rename", from ? from : to);
        else
            record('R', 0, from, to, strlen(to));
    }
    unlock();
    return result;
}
int rename(const char *old, const char *new) { return recorded_rename(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int old_dir, const char *old, int new_dir, const char *new) {
    return recorded_rename(old_dir, old, new_dir, new, 0);
}
int renameat2(int old_dir, const char *old, int new_dir, const char *new, unsigned flags) {
    return recorded_rename(old_dir, old, new_dir, new, flags);
}

int mkdirat(int dir, const char *path, mode_t mode) {
    REAL(mkdirat);
    char buffer[PATH_MAX * 2];
    const char *name = resolve(dir, path, 0, buffer);
    if (!name || !strcmp(name, ".")) return real(dir, path, mode);
    lock();
    int result = real(dir, path, mode);
    if (!result) record('M', 0, name, NULL, 0);
    unlock();
    return result;
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

/* What the model doesn't know: said in the log, which is then refused. ----------------------------------------------- */

static void unknown(struct place *p, int done, const char *call) {
    if (done && !p->is_marks) record_unknown(call, p->name);
}
void *mmap(void *address, size_t size, int prot, int flags, int fd, off_t at) {
    REAL(mmap);
    if (!(prot & PROT_WRITE) || (flags & MAP_ANONYMOUS) || (flags & MAP_TYPE) == MAP_PRIVATE)
        return real(address, size, prot, flags, fd, at);
    RECORDED(void *, real(address, size, prot, flags, fd, at), unknown(&p, result != MAP_FAILED, "mmap"));
}
void *mmap64(void *address, size_t size, int prot, int flags, int fd, off64_t at) {
    return mmap(address, size, prot, flags, fd, at);
}
ssize_t sendfile(int fd, int from, off_t *at, size_t n) {
    REAL(sendfile);
    RECORDED(ssize_t, real(fd, from, at, n), unknown(&p, result > 0, "sendfile"));
}
ssize_t sendfile64(int fd, int from, off64_t *at, size_t n) { return sendfile(fd, from, at, n); }
ssize_t copy_file_range(int from, off64_t *from_at, int fd, off64_t *at, size_t n, unsigned flags) {
    REAL(copy_file_range);
    RECORDED(ssize_t, real(from, from_at, fd, at, n, flags), unknown(&p, result > 0, "copy_file_range"));
}
int linkat(int old_dir, const char *old, int new_dir, const char *new, int flags) {
    REAL(linkat);
    char buffer[PATH_MAX * 2];
    const char *name = resolve(new_dir, new, 0, buffer);
    int result = real(old_dir, old, new_dir, new, flags);
    if (name && !result) record_unknown("link", name);
    return result;
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
int symlinkat(const char *old, int dir, const char *new) {
    REAL(symlinkat);
    char buffer[PATH_MAX * 2];
    const char *name = resolve(dir, new, 0, buffer);
    int result = real(old, dir, new);
    if (name && !result) record_unknown("symlink", name);
    return result;
}
int symlink(const char *old, const char *new) { return symlinkat(old, AT_FDCWD, new); }
