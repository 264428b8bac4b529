package edgekv.core

import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel

/**
 * The state buffers of a plan, outside the Java heap, page-aligned, zero, and costing RAM only as
 * rows are written: each is a private mapping of an empty scratch file that is gone at once.
 *
 * `ByteBuffer.allocateDirect` would do on a desktop; on Android it takes the bytes from the app's
 * Java heap, which is a few hundred megabytes at most, and touches all of them.
 */
class KvState(val plan: KvPlan, scratch: File) {
    private val buffers: Map<String, ByteBuffer> = plan.buffers.associate { it.name to map(it, scratch) }

    /** The bytes of one buffer, whole. */
    operator fun get(name: String): ByteBuffer = buffers.getValue(name).duplicate().order(ByteOrder.nativeOrder())

    /** The memory a program is given for `view`: the whole ring, or the first `live` rows of a head. */
    fun bytes(view: StateView, live: Int): ByteBuffer {
        val b = view.buffer
        return if (view.head == null) get(b.name) else slice(b, view.head, 0, live)
    }

    /** Rows `from` until `until` of one head. */
    fun slice(b: StateBuffer, head: Int, from: Int, until: Int): ByteBuffer {
        val all = get(b.name)
        val start = head * b.slots
        all.limit((start + until) * b.headRowBytes)
        all.position((start + from) * b.headRowBytes)
        return all.slice().order(ByteOrder.nativeOrder())
    }

    private fun map(b: StateBuffer, scratch: File): ByteBuffer {
        if (b.bytes > Int.MAX_VALUE) {
            throw MemoryLimitException(
                "${b.name} takes ${b.bytes} bytes, more than one mapping holds; export with a smaller --ctx.",
            )
        }
        try {
            val file = File.createTempFile("state", ".kv", scratch)
            try {
                RandomAccessFile(file, "rw").use {
                    it.setLength(b.bytes)
                    return it.channel.map(FileChannel.MapMode.PRIVATE, 0, b.bytes)
                }
            } finally {
                file.delete()
            }
        } catch (e: IOException) {
            throw MemoryLimitException("Cannot map ${b.bytes} bytes of state in $scratch: ${e.message}.", e)
        }
    }
}
