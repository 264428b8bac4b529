package edgekv.core

import java.security.MessageDigest

/**
 * One preallocated state tensor [heads, slots, dim] (scales: [heads, slots]), row-major.
 *
 * Kept as it stands in the manifest: `edge_kv.kv_plan` is the only code that computes a shape.
 */
class StateBuffer(
    val name: String,
    val role: String,
    val kind: String,
    val shape: List<Int>,
    val dtype: String,
    val writer: Int,
    val readers: List<Int>,
    val bytes: Long,
) {
    val heads get() = shape[0]
    val slots get() = shape[1]
    val isRing get() = kind == "ring"

    /** Bytes of one position of one head. */
    val headRowBytes: Int get() = (shape.getOrNull(2) ?: 1) * BYTES.getValue(dtype)

    val rowBytes: Int get() = heads * headRowBytes

    companion object {
        val BYTES = mapOf("f32" to 4, "f16" to 2, "int8" to 1)
    }
}

/**
 * How a program sees a buffer: its input `name` (the output is `name.out`).
 *
 * A ring is bound whole, an append buffer one head at a time as a prefix of `live` rows.
 */
class StateView(val name: String, val buffer: StateBuffer, val head: Int?) {
    fun shape(live: Int): LongArray {
        val rest = buffer.shape.drop(2)
        val sizes = if (head == null) listOf(1) + buffer.shape else listOf(1, live) + rest
        return LongArray(sizes.size) { sizes[it].toLong() }
    }
}

/** All state of one artifact at its context length. */
class KvPlan(
    val ctx: Int,
    val chunk: Int,
    val kv: String,
    slidingWindow: Int,
    val buffers: List<StateBuffer>,
) {
    val window = minOf(slidingWindow, ctx)
    val bytes: Long get() = buffers.sumOf { it.bytes }
    val ringSlots: Int = buffers.firstOrNull { it.isRing }?.slots ?: 0

    val views: List<StateView> = buffers.flatMap { b ->
        if (b.isRing) listOf(StateView(b.name, b, null))
        else (0 until b.heads).map { StateView("${b.name}.h$it", b, it) }
    }

    /** SHA-256 of the stored form, as `edge_kv.runtime.snapshot.plan_digest` computes it. */
    val digest: String by lazy {
        val stored = buffers.map {
            linkedMapOf(
                "name" to it.name, "role" to it.role, "kind" to it.kind, "shape" to it.shape,
                "dtype" to it.dtype, "writer" to it.writer, "readers" to it.readers, "bytes" to it.bytes,
            )
        }
        sha256Hex(Json.compact(linkedMapOf("ctx" to ctx, "chunk" to chunk, "kv" to kv, "buffers" to stored)))
    }

    /** Rows of an append buffer to bind so that positions below `end` are in view. */
    fun liveRows(end: Int): Int = minOf(ctx, (end + LIVE_STEP - 1) / LIVE_STEP * LIVE_STEP)

    /** Bytes of state that hold rows once `depth` positions were written. */
    fun touchedBytes(depth: Int): Long = buffers.sumOf { minOf(depth, it.slots).toLong() * it.rowBytes }

    /** Bytes of state one decoded token reads at `depth`: each reader reads anew. */
    fun readTraffic(depth: Int): Long = buffers.sumOf {
        it.readers.size.toLong() * minOf(depth, if (it.isRing) window else ctx) * it.rowBytes
    }

    /** First position that every ring still holds after positions 0 … written-1 were written. */
    fun oldestRetained(written: Int): Int = if (ringSlots > 0) maxOf(0, written - ringSlots) else 0

    /** Whether decoding may go on at `to` after `written` positions were written. */
    fun canRewind(to: Int, written: Int): Boolean {
        val oldest = oldestRetained(written)
        return to in 0..written && (oldest == 0 || to == 0 || to - window + 1 >= oldest)
    }

    /**
     * Refuses a plan that could lose a key: the checks of `KVPlan.validate` and of every size.
     *
     * @throws ArtifactException naming the buffer
     */
    fun validate(layers: Int) {
        if (ctx < 1 || chunk !in 1..ctx) refuse("plans chunks of $chunk in a context of $ctx")
        val names = HashSet<String>()
        for (b in buffers) {
            if (!names.add(b.name)) refuse("plans ${b.name} twice")
            if (b.dtype !in StateBuffer.BYTES) refuse("stores ${b.name} as ${b.dtype}")
            if (b.kind != "ring" && b.kind != "append") refuse("plans ${b.name} as '${b.kind}'")
            if (b.shape.size !in 2..3 || b.shape.any { it < 1 }) refuse("gives ${b.name} the shape ${b.shape}")
            val need = if (b.isRing) minOf(ctx, window + chunk - 1) else ctx
            val enough = if (b.isRing) b.slots >= need else b.slots == need
            if (!enough) refuse("gives ${b.name} ${b.slots} slots where $need are needed")
            if (b.isRing && b.slots != ringSlots) refuse("has rings of ${b.slots} and of $ringSlots slots")
            if (b.slots.toLong() * b.rowBytes != b.bytes) refuse("says ${b.name} takes ${b.bytes} bytes")
            val readers = b.readers
            if (b.writer !in 0 until layers || readers.isEmpty() || readers.any { it !in b.writer until layers }) {
                refuse("has ${b.name} read before layer ${b.writer} writes it")
            }
        }
        for (b in buffers) if (b.dtype == "int8" && "${b.name}.scale" !in names) refuse("has no ${b.name}.scale")
    }

    private fun refuse(what: String): Nothing =
        throw ArtifactException("The manifest's KV plan $what; it was edited or is damaged; export again.")

    companion object {
        /** Append buffers are bound as prefix views of a multiple of this many rows. */
        const val LIVE_STEP = 256
    }
}

internal fun sha256Hex(text: String): String =
    MessageDigest.getInstance("SHA-256").digest(text.toByteArray()).hex()

internal fun ByteArray.hex(): String = joinToString("") { (it.toInt() and 255).toString(16).padStart(2, '0') }
