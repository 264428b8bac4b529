/* The names by which the JNI library of onnxruntime's Android package (x86_64) asks Android's libc
   for what every libc has, so that this very library runs in a desktop JVM over onnxruntime's Linux
   build of the same version. Compiled as libc.so, with libdl.so and libm.so as links to it.

   A function must not call the name it stands for, that would be itself. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

extern void *__libc_malloc(size_t);
extern void *__libc_realloc(void *, size_t);
extern void __libc_free(void *);

#define ANDROID(name, version) __asm__(".symver android_" #name "," #name "@@" version)
ANDROID(malloc, "LIBC");
ANDROID(realloc, "LIBC");
ANDROID(free, "LIBC");
ANDROID(memcpy, "LIBC");
ANDROID(strlen, "LIBC");
ANDROID(dlclose, "LIBC");
ANDROID(__cxa_atexit, "LIBC");
ANDROID(__cxa_finalize, "LIBC");
ANDROID(__register_atfork, "LIBC");
ANDROID(__stack_chk_fail, "LIBC");
ANDROID(OrtSessionOptionsAppendExecutionProvider_Nnapi, "VERS_1.29.0");

void *android_malloc(size_t size) { return __libc_malloc(size); }
void *android_realloc(void *block, size_t size) { return __libc_realloc(block, size); }
void android_free(void *block) { __libc_free(block); }
void *android_memcpy(void *to, const void *from, size_t size) { return memmove(to, from, size); }
size_t android_strlen(const char *text) { return strnlen(text, SIZE_MAX); }

/* Never unloaded, never forked, and NNAPI is never asked for. */
int android_dlclose(void *handle) { return 0; }
int android___cxa_atexit(void (*f)(void *), void *argument, void *library) { return 0; }
void android___cxa_finalize(void *library) {}
int android___register_atfork(void (*a)(void), void (*b)(void), void (*c)(void), void *library) { return 0; }
void android___stack_chk_fail(void) { abort(); }
void *android_OrtSessionOptionsAppendExecutionProvider_Nnapi(void) { return NULL; }
