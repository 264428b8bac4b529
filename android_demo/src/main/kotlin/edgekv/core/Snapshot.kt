package edgekv.core

import java.io.Closeable
import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import java.security.MessageDigest

/**
 * Snapshot files: the live rows of a session, in the format of docs/artifact.md, so that a long
 * prompt is read once, on this device or on another. Rows stream between file and tables.
 */
object Snapshot {
    private const val MAGIC = "EDGEKVSN"
    private const val VERSION = 2
    private const val PREFIX_BYTES = 16
    private const val DIGEST_BYTES = 32
    private const val MAX_HEADER = 1 shl 24

    /** What a snapshot belongs to: it is refused anywhere else. */
    class Identity(engine: String, of: edgekv.core.Identity) {
        val entries = mapOf("engine" to engine, "model" to of.model, "plan" to of.plan)
    }

    /** @throws SnapshotException the file cannot be written */
    fun write(
        file: File,
        identity: Identity,
        plan: Plan,
        state: KvState,
        tokens: IntArray,
        written: Int,
        note: Map<String, Any?>,
    ) {
        val header = identity.entries + mapOf(
            "pos" to tokens.size, "written" to written, "note" to note, "sections" to sections(plan, tokens.size, written),
        )
        val text = Json.write(header).toByteArray()
        val head = ByteBuffer.allocate(PREFIX_BYTES + text.size + 4 * tokens.size).order(ByteOrder.LITTLE_ENDIAN)
        head.put(MAGIC.toByteArray()).putInt(VERSION).putInt(text.size).put(text)
        tokens.forEach { head.putInt(it) }
        head.flip()
        val part = File(file.path + ".part")
        val digest = MessageDigest.getInstance("SHA-256")
        try {
            RandomAccessFile(part, "rw").use { out ->
                out.setLength(0)
                val channel = out.channel
                fun put(bytes: ByteBuffer) {
                    digest.update(bytes.duplicate())
                    while (bytes.hasRemaining()) channel.write(bytes)
                }
                put(head)
                state.held(tokens.size, written).forEach(::put)
                channel.write(ByteBuffer.wrap(digest.digest()))
                channel.force(true)
            }
            if (!part.renameTo(file)) throw IOException("it cannot be renamed")
        } catch (e: IOException) {
            throw SnapshotException("Cannot write the snapshot $file: ${e.message}.", e)
        } finally {
            part.delete()
        }
    }

    /** A verified snapshot, open at its rows. */
    class Held internal constructor(
        private val file: File,
        private val channel: FileChannel,
        val tokens: IntArray,
        val written: Int,
        val note: Map<String, Any?>,
    ) : Closeable {
        /** Reads the rows into the buffers of a session. */
        fun load(state: KvState) = state.held(tokens.size, written).forEach {
            try {
                readFully(channel, it)
            } catch (e: IOException) {
                throw SnapshotException("Cannot read $file (${e.message}); session emptied.", e)
            }
        }

        override fun close() = channel.close()
    }

    /**
     * Opens a snapshot after checking all of it: digest, owner, and that its rows fit `plan`.
     *
     * @throws SnapshotException missing, cut off, changed, or of another version, model, plan, engine
     */
    fun open(file: File, identity: Identity, plan: Plan): Held {
        val channel = try {
            RandomAccessFile(file, "r").channel
        } catch (e: IOException) {
            throw SnapshotException("Cannot open the snapshot $file: ${e.message}.", e)
        }
        try {
            return held(file, channel, identity, plan)
        } catch (e: IOException) {
            channel.close()
            throw SnapshotException("Cannot read the snapshot $file: ${e.message}.", e)
        } catch (e: SnapshotException) {
            channel.close()
            throw e
        }
    }

    private fun held(file: File, channel: FileChannel, identity: Identity, plan: Plan): Held {
        val (header, body) = verify(file, channel)
        for ((key, mine) in identity.entries) {
            val theirs = header[key]
            if (theirs != mine) {
                throw SnapshotException(
                    "$file belongs to another $key (${theirs.toString().take(12)}, this one is ${mine.take(12)}); " +
                        "restore it where it was taken, or prefill again.",
                )
            }
        }
        val pos = (header["pos"] as? Long)?.toInt() ?: -1
        val written = (header["written"] as? Long)?.toInt() ?: -1
        val possible = pos in 0..written && written <= plan.ctx && plan.canRewind(pos, written)
        val wanted = if (possible) sections(plan, pos, written) else null
        val bytes = wanted?.sumOf { it.getValue("bytes") as Long }
        if (wanted == null || bytes != body - checkpointBytes(header) || header["sections"] != wanted) {
            throw SnapshotException("$file does not hold the rows its plan asks for; take it again.")
        }
        val ids = ByteBuffer.allocate(4 * pos).order(ByteOrder.LITTLE_ENDIAN)
        readFully(channel, ids)
        ids.flip()
        @Suppress("UNCHECKED_CAST") // JSON objects have text keys
        val note = header["note"] as? Map<String, Any?> ?: emptyMap()
        return Held(file, channel, IntArray(pos) { ids.getInt() }, written, note)
    }

    /** Checks framing and digest: the header and the bytes of all sections, `channel` at the first. */
    private fun verify(file: File, channel: FileChannel): Pair<Map<*, *>, Long> {
        val prefix = ByteBuffer.allocate(PREFIX_BYTES).order(ByteOrder.LITTLE_ENDIAN)
        while (prefix.hasRemaining()) if (channel.read(prefix) < 0) break
        if (prefix.hasRemaining() || String(prefix.array(), 0, MAGIC.length, Charsets.ISO_8859_1) != MAGIC) {
            throw SnapshotException("$file is not an edge-kv snapshot; give a file that edge-kv wrote.")
        }
        val version = prefix.getInt(MAGIC.length)
        if (version != VERSION) {
            throw SnapshotException("$file is a snapshot of version $version, this app reads $VERSION; take it again.")
        }
        val length = prefix.getInt(MAGIC.length + 4)
        val body = channel.size() - PREFIX_BYTES - DIGEST_BYTES
        val damaged = SnapshotException("$file is cut off or changed (its digest differs); take it again.")
        if (length < 1 || length > minOf(body, MAX_HEADER.toLong())) throw damaged
        if (!digestMatches(channel, prefix.array(), body)) throw damaged
        channel.position(PREFIX_BYTES.toLong())
        val text = ByteBuffer.allocate(length)
        readFully(channel, text)
        val header = try {
            Json.parse(text.array())
        } catch (e: JsonException) {
            throw SnapshotException("$file has a header that is not JSON; take it again.", e)
        }
        if (header !is Map<*, *>) throw SnapshotException("$file has a header that is not an object; take it again.")
        return Pair(header, body - length)
    }

    /** Bytes of the rings as they were at earlier turns, which follow the rows; they are not taken up. */
    private fun checkpointBytes(header: Map<*, *>): Long =
        (header["checkpoints"] as? List<*>).orEmpty().sumOf { (it as? Map<*, *>)?.get("bytes") as? Long ?: 0L }

    private fun digestMatches(channel: FileChannel, prefix: ByteArray, body: Long): Boolean {
        val digest = MessageDigest.getInstance("SHA-256")
        digest.update(prefix)
        val block = ByteBuffer.allocate(1 shl 20)
        var left = body
        while (left > 0) {
            block.clear().limit(minOf(left, block.capacity().toLong()).toInt())
            readFully(channel, block)
            left -= block.position()
            digest.update(block.array(), 0, block.position())
        }
        val stored = ByteBuffer.allocate(DIGEST_BYTES)
        readFully(channel, stored)
        return digest.digest().contentEquals(stored.array())
    }

    private fun sections(plan: Plan, pos: Int, written: Int): List<Map<String, Any>> =
        listOf(section("tokens", pos, 4)) + plan.tables.map { t ->
            val rows = t.held(pos, written)
            section(t.name, if (rows.isEmpty()) 0 else rows.last - rows.first + 1, t.rowBytes)
        }

    private fun section(name: String, rows: Int, rowBytes: Long): Map<String, Any> =
        mapOf("name" to name, "rows" to rows.toLong(), "bytes" to rows * rowBytes)

    private fun readFully(channel: FileChannel, into: ByteBuffer) {
        while (into.hasRemaining()) if (channel.read(into) < 0) throw IOException("the file shrank while it was read")
    }
}
