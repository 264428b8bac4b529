package edgekv.core

import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel

/**
 * The state tables of a plan, outside the Java heap, page-aligned, zero, and costing RAM only as rows
 * are written: each is a private mapping of an empty file in `scratch` that is gone at once.
 *
 * `ByteBuffer.allocateDirect` would do on a desktop; on Android it takes the bytes from the app's
 * Java heap, which is a few hundred megabytes at most, and touches all of them.
 */
class KvState(val plan: Plan, private val scratch: File) {
    private val tables: Map<String, ByteBuffer> = plan.tables.associate { it.name to map(it.name, it.slots * it.rowBytes) }

    /** The memory of slots `from` until `until` of a table. */
    fun slots(table: Table, from: Int, until: Int): ByteBuffer {
        val all = tables.getValue(table.name).duplicate()
        all.limit((until * table.rowBytes).toInt())
        all.position((from * table.rowBytes).toInt())
        return all.slice().order(ByteOrder.nativeOrder())
    }

    /** The rows that a snapshot at `pos` keeps, as contiguous pieces, in the order of its file. */
    fun held(pos: Int, written: Int, onlyRings: Boolean = false): Sequence<ByteBuffer> = sequence {
        for (t in plan.tables) {
            val rows = t.held(pos, written)
            if (rows.isEmpty() || onlyRings && t.keep == 0) continue
            val count = rows.last - rows.first + 1
            val first = rows.first % t.slots
            val beforeWrap = minOf(count, t.slots - first)
            yield(slots(t, first, first + beforeWrap))
            if (count > beforeWrap) yield(slots(t, 0, count - beforeWrap))
        }
    }

    /** A copy of the rows of the rings, as memory of the same kind; null where there are none. */
    fun keepRings(pos: Int, written: Int): ByteBuffer? {
        val bytes = held(pos, written, onlyRings = true).sumOf { it.remaining().toLong() }
        if (bytes == 0L) return null
        val kept = map("A checkpoint", bytes)
        held(pos, written, onlyRings = true).forEach { kept.put(it) }
        kept.flip()
        return kept
    }

    /** Puts rows that `keepRings` kept back to where they were. */
    fun putRings(kept: ByteBuffer, pos: Int, written: Int) {
        val rest = kept.duplicate()
        for (piece in held(pos, written, onlyRings = true)) {
            val part = rest.duplicate()
            part.limit(rest.position() + piece.remaining())
            rest.position(part.limit())
            piece.put(part)
        }
    }

    private fun map(name: String, bytes: Long): ByteBuffer {
        if (bytes > Int.MAX_VALUE) {
            throw MemoryLimitException(
                "$name takes $bytes bytes, more than one mapping holds; export with a smaller --ctx.",
            )
        }
        try {
            val file = File.createTempFile("state", ".kv", scratch)
            try {
                RandomAccessFile(file, "rw").use {
                    it.setLength(bytes)
                    return it.channel.map(FileChannel.MapMode.PRIVATE, 0, bytes)
                }
            } finally {
                file.delete()
            }
        } catch (e: IOException) {
            throw MemoryLimitException("Cannot map $bytes bytes of state in $scratch: ${e.message}.", e)
        }
    }
}
