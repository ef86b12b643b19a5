/* Faults in a process's file operations, by LD_PRELOAD: counts what changes files below one folder, and kills the
 * process at, or lets fail from, the n-th of them. `shim.py` builds it and speaks to it.
 *
 * Only operations that change something count. What is done without the library's functions is not seen: glibc's own
 * writes (fopen), and safetensors' rename, which is a bare system call. A trace therefore tells files by their inode.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, WRITE, RENAME, UNLINK, MKDIR, RMDIR, TRUNCATE, FSYNC, LINK, CLOSE, KINDS };
enum { NONE, KILL, FAIL };
enum { BEFORE, INSIDE, AFTER };

static char root[PATH_MAX];
static size_t root_length;
static int mode = NONE, place, failing_errno, trace = -1;
static long number, at, budget, failed;

void faults_watch(const char *folder)
{
    snprintf(root, sizeof root, "%s", folder ? folder : "");
    root_length = strlen(root);
    number = failed = 0;
}

void faults_trace(int fd) { trace = fd; }
void faults_kill(long operation, int when) { mode = KILL, at = operation, place = when; }

/* From this operation on, and after `bytes` more have been written, everything that needs room (ENOSPC, EDQUOT), a
 * sound disk (EIO: writes and fsync), or a writable one (EROFS: all) fails. */
void faults_fail(long operation, long bytes, int code)
{
    mode = FAIL, at = operation, budget = bytes, failing_errno = code;
}

void faults_off(void) { mode = NONE, root_length = 0; }
long faults_failed(void) { return failed; }

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int below(const char *path)
{
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int of_descriptor(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

static void absolute(int folder, const char *name, char *path)
{
    char base[PATH_MAX] = "";
    if (!name) name = "";
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else {
        of_descriptor(folder, base);
    }
    if (strlen(base) + strlen(name) + 2 < PATH_MAX) sprintf(path, "%s/%s", base, name);
    else path[0] = 0;
}

static void die(void)
{
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

static int fails(int kind)
{
    if (failing_errno == EROFS) return kind != CLOSE && kind != FSYNC;
    if (failing_errno == EIO) return kind == WRITE || kind == FSYNC;
    return kind == OPEN || kind == WRITE || kind == MKDIR || kind == LINK;
}

/* Whether an operation counts, and what becomes of it. */
struct visit {
    int counts, dies, failing;
    size_t allowed; /* bytes that still go out */
};

static struct visit enter(int kind, const char *path, size_t bytes, const char *other, int fd)
{
    struct visit found = {0, 0, 0, bytes};
    if (!root_length || (!below(path) && !(other && below(other)))) return found;
    found.counts = 1;
    long own = __atomic_add_fetch(&number, 1, __ATOMIC_SEQ_CST);
    if (trace >= 0) {
        char line[2 * PATH_MAX + 64];
        struct stat file = {0};
        if (fd >= 0 ? fstat(fd, &file) : lstat(path, &file)) file.st_ino = 0;
        int length = snprintf(line, sizeof line, "%d\t%zu\t%lu\t%s\t%s\n", kind, bytes,
                              (unsigned long)file.st_ino, path, other ? other : "");
        if (syscall(SYS_write, trace, line, (size_t)length) < 0) trace = -1;
    }
    if (mode == KILL && own == at) {
        if (place == BEFORE) die();
        found.dies = 1;
        if (place == INSIDE) found.allowed = bytes / 2;
    }
    if (mode == FAIL && own >= at && fails(kind)) {
        if (kind == WRITE && budget > 0) {
            found.allowed = bytes < (size_t)budget ? bytes : (size_t)budget;
            budget -= found.allowed;
        } else if (kind == WRITE || kind == FSYNC || failing_errno == EROFS || budget <= 0) {
            found.failing = failing_errno;
            failed++;
        }
    }
    return found;
}

static long leave(struct visit found, long result)
{
    if (found.dies) die();
    return result;
}

#define GUARD(kind, path, other, fd) \
    struct visit found = enter(kind, path, 0, other, fd); \
    if (found.failing) return errno = found.failing, -1

/* --- open ------------------------------------------------------------------------------------------------------- */
static int changes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC)); }

static int opened(int folder, const char *path, int flags, mode_t rights)
{
    REAL(int, "openat", int, const char *, int, ...);
    if (!root_length || !changes(flags)) return real(folder, path, flags, rights);
    char whole[PATH_MAX];
    absolute(folder, path, whole);
    GUARD(OPEN, whole, NULL, -1);
    return leave(found, real(folder, path, flags, rights));
}

#define RIGHTS \
    va_list rest; \
    va_start(rest, flags); \
    mode_t rights = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest)

int open(const char *path, int flags, ...) { RIGHTS; return opened(AT_FDCWD, path, flags, rights); }
int open64(const char *path, int flags, ...) { RIGHTS; return opened(AT_FDCWD, path, flags, rights); }
int openat(int f, const char *path, int flags, ...) { RIGHTS; return opened(f, path, flags, rights); }
int openat64(int f, const char *path, int flags, ...) { RIGHTS; return opened(f, path, flags, rights); }
int __open_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int creat(const char *path, mode_t rights)
{
    return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, rights);
}
int creat64(const char *path, mode_t rights) { return creat(path, rights); }

static FILE *opened_stream(const char *name, const char *path, const char *kind)
{
    FILE *(*real)(const char *, const char *) = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, name);
    if (!root_length || !strpbrk(kind, "wa+")) return real(path, kind);
    char whole[PATH_MAX];
    absolute(AT_FDCWD, path, whole);
    struct visit found = enter(OPEN, whole, 0, NULL, -1);
    if (found.failing) return errno = found.failing, NULL;
    FILE *result = real(path, kind);
    leave(found, 0);
    return result;
}
FILE *fopen(const char *path, const char *kind) { return opened_stream("fopen", path, kind); }
FILE *fopen64(const char *path, const char *kind) { return opened_stream("fopen64", path, kind); }

/* --- write ------------------------------------------------------------------------------------------------------ */
#define WRITING(call_all, call_part) \
    char path[PATH_MAX]; \
    if (!root_length || !of_descriptor(fd, path)) return call_all; \
    struct visit found = enter(WRITE, path, size, NULL, fd); \
    if (found.failing) return errno = found.failing, -1; \
    if (found.allowed < size) return leave(found, call_part); \
    return leave(found, call_all)

ssize_t write(int fd, const void *data, size_t size)
{
    REAL(ssize_t, "write", int, const void *, size_t);
    WRITING(real(fd, data, size), real(fd, data, found.allowed));
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset)
{
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    WRITING(real(fd, data, size, offset), real(fd, data, found.allowed, offset));
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return pwrite(fd, data, size, offset); }
ssize_t writev(int fd, const struct iovec *parts, int count)
{
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    size_t size = 0, first = count > 0 ? parts[0].iov_len : 0;
    for (int part = 0; part < count; part++) size += parts[part].iov_len;
    WRITING(real(fd, parts, count),
            syscall(SYS_write, fd, parts[0].iov_base, found.allowed < first ? found.allowed : first));
}
static size_t at_most(int from, size_t size)
{
    struct stat file;
    return !fstat(from, &file) && S_ISREG(file.st_mode) && (size_t)file.st_size < size ? (size_t)file.st_size : size;
}
ssize_t sendfile(int fd, int from, off_t *offset, size_t size)
{
    size = at_most(from, size);
    REAL(ssize_t, "sendfile", int, int, off_t *, size_t);
    WRITING(real(fd, from, offset, size), real(fd, from, offset, found.allowed));
}
ssize_t sendfile64(int fd, int from, off64_t *offset, size_t size) { return sendfile(fd, from, offset, size); }
ssize_t copy_file_range(int from, off64_t *offset, int fd, off64_t *to, size_t size, unsigned flags)
{
    size = at_most(from, size);
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    WRITING(real(from, offset, fd, to, size, flags), real(from, offset, fd, to, found.allowed, flags));
}

/* --- the rest --------------------------------------------------------------------------------------------------- */
#define BY_NAME(kind, folder, name, other, call) \
    char whole[PATH_MAX]; \
    if (!root_length) return call; \
    absolute(folder, name, whole); \
    GUARD(kind, whole, other, -1); \
    return leave(found, call)

int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
{
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    char target[PATH_MAX] = "";
    if (root_length) absolute(to, new, target);
    BY_NAME(RENAME, from, old, target, real(from, old, to, new, flags));
}
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int folder, const char *name, int flags)
{
    REAL(int, "unlinkat", int, const char *, int);
    BY_NAME(flags & AT_REMOVEDIR ? RMDIR : UNLINK, folder, name, NULL, real(folder, name, flags));
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int mkdirat(int folder, const char *name, mode_t rights)
{
    REAL(int, "mkdirat", int, const char *, mode_t);
    BY_NAME(MKDIR, folder, name, NULL, real(folder, name, rights));
}
int mkdir(const char *name, mode_t rights) { return mkdirat(AT_FDCWD, name, rights); }

int linkat(int from, const char *old, int to, const char *new, int flags)
{
    REAL(int, "linkat", int, const char *, int, const char *, int);
    BY_NAME(LINK, to, new, NULL, real(from, old, to, new, flags));
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
int symlinkat(const char *old, int to, const char *new)
{
    REAL(int, "symlinkat", const char *, int, const char *);
    BY_NAME(LINK, to, new, NULL, real(old, to, new));
}
int symlink(const char *old, const char *new) { return symlinkat(old, AT_FDCWD, new); }

int truncate(const char *name, off_t size)
{
    REAL(int, "truncate", const char *, off_t);
    BY_NAME(TRUNCATE, AT_FDCWD, name, NULL, real(name, size));
}
int truncate64(const char *name, off64_t size) { return truncate(name, size); }

#define BY_DESCRIPTOR(kind, call) \
    char path[PATH_MAX]; \
    if (!root_length || !of_descriptor(fd, path)) return call; \
    GUARD(kind, path, NULL, fd); \
    return leave(found, call)

int ftruncate(int fd, off_t size)
{
    REAL(int, "ftruncate", int, off_t);
    BY_DESCRIPTOR(TRUNCATE, real(fd, size));
}
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }
int fsync(int fd)
{
    REAL(int, "fsync", int);
    BY_DESCRIPTOR(FSYNC, real(fd));
}
int fdatasync(int fd)
{
    REAL(int, "fdatasync", int);
    BY_DESCRIPTOR(FSYNC, real(fd));
}
int close(int fd)
{
    REAL(int, "close", int);
    if (!root_length || (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY) return real(fd);
    BY_DESCRIPTOR(CLOSE, real(fd));
}
