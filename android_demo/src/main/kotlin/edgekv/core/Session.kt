package edgekv.core

import java.io.Closeable
import java.io.File
import java.nio.ByteBuffer

/** What a session has done since it was loaded; seconds of wall clock. */
class Stats {
    var loadSeconds = 0.0
    @Volatile var prefillTokens = 0
    @Volatile var prefillSeconds = 0.0
    @Volatile var decodeTokens = 0
    @Volatile var decodeSeconds = 0.0

    val decodeRate get() = if (decodeSeconds > 0) decodeTokens / decodeSeconds else 0.0
}

/**
 * One running model: state, position, and the rules of moving back that no engine decides.
 *
 * The last token of a prompt goes through `decode`, the others through `prefill`. A session is used
 * from one thread; `cancel` alone may come from another. After an error or a cancelled step it
 * stands where the last finished step left it. The rules are those of `edge_kv.runtime.session`.
 */
abstract class Session(val artifact: Artifact) : Closeable {
    abstract val engine: String
    val plan get() = artifact.plan
    val stats = Stats()

    private val fed = IntList()
    private var checkpoints: List<Checkpoint> = emptyList() // by length
    private var closed = false
    @Volatile private var cancelled = false

    init {
        artifact.checkSamples()
    }

    /** Position of the next token: how many were fed. */
    val pos get() = fed.size

    /** Ids fed so far, in order. */
    val tokens: IntArray get() = fed.toArray()

    /** Positions below it may have been written since the last reset: rings hold the last of them. */
    var written = 0
        private set

    /** How many tokens `rewind` can go back without starting over. */
    val maxRewind: Int
        get() = pos - plan.earliest(written)

    /** Whether `snapshot` and `restore` work: the engine's state can be reached. */
    open val canSnapshot get() = true

    /** Whether weights are mapped from a file packed for this device, rather than on the heap. */
    open val packed get() = false

    /**
     * Feeds `ids` in chunks of `plan.chunk`; yields no logits. Finished chunks stay fed.
     *
     * @throws PromptException an id the model does not know
     * @throws ContextFullException they do not fit
     * @throws CancelledException `cancel` was called
     */
    fun prefill(ids: IntArray) {
        check(ids)
        for (start in ids.indices step plan.chunk) {
            val part = ids.copyOfRange(start, minOf(ids.size, start + plan.chunk))
            val begin = System.nanoTime()
            step(part) { runPrefill(part, pos) }
            stats.prefillSeconds += (System.nanoTime() - begin) / 1e9
            stats.prefillTokens += part.size
        }
    }

    /** Feeds one id; the logits of its successor, [vocab], valid until the next step. */
    fun decode(id: Int): FloatArray {
        val ids = intArrayOf(id)
        check(ids)
        val begin = System.nanoTime()
        val logits = step(ids) { runDecode(id, pos) }
        stats.decodeSeconds += (System.nanoTime() - begin) / 1e9
        stats.decodeTokens++
        return logits
    }

    /**
     * Forgets the last `n` tokens; costs nothing, the rows are masked by position.
     *
     * @throws RewindException `n` is negative or beyond `maxRewind`
     */
    fun rewind(n: Int) {
        checkOpen()
        if (n < 0 || !plan.canRewind(pos - n, written)) {
            throw RewindException(
                "Cannot rewind $n tokens from position $pos: the rings reach back $maxRewind; " +
                    "rewind at most that far, or reset and prefill again.",
            )
        }
        fed.truncate(pos - n)
        if (pos == 0) written = 0
    }

    /** Forgets everything but checkpoints; tables stay allocated. */
    fun reset() {
        checkOpen()
        fed.truncate(0)
        written = 0
    }

    /**
     * Keeps the rings as they are after the first `at` tokens, for `resume` to go back to.
     *
     * Does nothing where the rings no longer hold those rows, or where there are no rings. At most
     * three are kept: the first, the newest, and the others as far apart as they come.
     */
    fun checkpoint(at: Int) {
        checkOpen()
        if (!canSnapshot || at !in 1..pos || !plan.canRewind(at, written)) return
        val rows = state().keepRings(at, written) ?: return
        val kept = checkpoints.filter { it.tokens.size != at } + Checkpoint(fed.toArray(0, at), written, rows)
        checkpoints = kept.sortedBy { it.tokens.size }
        if (checkpoints.size <= CHECKPOINTS) return
        val gaps = checkpoints.dropLast(1).map { it.tokens.size }.zipWithNext { a, b -> b - a }
        val closest = 1 + gaps.indexOf(gaps.min())
        checkpoints = checkpoints.filterIndexed { i, _ -> i != closest }
    }

    /**
     * Goes back to the longest beginning of `ids` that is still held, and returns its length: the common
     * prefix where the rings reach back so far, else the last checkpoint before it, else nothing.
     */
    fun resume(ids: IntArray): Int {
        checkOpen()
        var common = commonPrefix(tokens, ids)
        if (!plan.canRewind(common, written)) common = 0
        val best = checkpoints.lastOrNull { it.tokens.size > common && commonPrefix(it.tokens, ids) == it.tokens.size }
        if (best == null) {
            rewind(pos - common)
            return common
        }
        state().putRings(best.rows, best.tokens.size, best.written)
        fed.truncate(0)
        fed.addAll(best.tokens)
        written = best.written
        return best.tokens.size
    }

    /**
     * Makes the fed ids equal `ids`, reusing what is held of them, and returns how much that was. The
     * rings are kept at every length in `at`.
     */
    fun feed(ids: IntArray, at: Collection<Int> = emptyList()): Int {
        val reused = resume(ids)
        for (length in at.filter { it in 1..ids.size }.sorted()) {
            if (length > pos) { // whole chunks: the rings still hold the rows before them
                val chunks = (length - pos + plan.chunk - 1) / plan.chunk
                prefill(ids.copyOfRange(pos, minOf(pos + chunks * plan.chunk, ids.size)))
            }
            checkpoint(length)
        }
        prefill(ids.copyOfRange(pos, ids.size))
        return reused
    }

    /** Writes the live rows and the ids; the format of `edge_kv.runtime.snapshot`. */
    fun snapshot(file: File, note: Map<String, Any?> = emptyMap()) {
        checkOpen()
        Snapshot.write(file, identity(), plan, state(), tokens, written, note)
    }

    /**
     * Continues from a snapshot, of this or of the Python runtime; returns its note.
     *
     * @throws SnapshotException missing, cut off, changed, or of another model, plan or engine
     */
    fun restore(file: File): Map<String, Any?> {
        checkOpen()
        return Snapshot.open(file, identity(), plan).use { held ->
            reset()
            checkpoints = emptyList()
            held.load(state())
            fed.addAll(held.tokens)
            written = held.written
            held.note
        }
    }

    /** Ends the running step and all further ones until `proceed`; from any thread. */
    fun cancel() {
        cancelled = true
        interruptEngine()
    }

    /** Allows steps again after `cancel`. */
    fun proceed() {
        cancelled = false
        proceedEngine()
    }

    override fun close() {
        if (closed) return
        closed = true
        checkpoints = emptyList()
        closeEngine()
    }

    /** Writes the rows of `ids` at positions pos … pos + ids.size - 1. */
    protected abstract fun runPrefill(ids: IntArray, pos: Int)

    /** Writes the row of `id` at `pos` and returns float [vocab]. */
    protected abstract fun runDecode(id: Int, pos: Int): FloatArray

    /** The tables, for an engine whose memory they are. */
    protected open fun state(): KvState =
        throw SnapshotException("The $engine engine keeps its state inside the program: it has no snapshots here.")

    protected open fun interruptEngine() {}

    protected open fun proceedEngine() {}

    protected abstract fun closeEngine()

    private fun identity() = Snapshot.Identity(engine, artifact.manifest.identity)

    /** Runs one program and commits its ids; the high-water mark rises before the run. */
    private fun <T> step(ids: IntArray, run: () -> T): T {
        if (cancelled) throw CancelledException()
        checkpoints = checkpoints.filter { it.tokens.size <= pos }
        written = maxOf(written, pos + ids.size)
        val result = try {
            run()
        } catch (e: RuntimeFault) {
            throw if (cancelled) CancelledException() else e
        }
        fed.addAll(ids)
        return result
    }

    private fun check(ids: IntArray) {
        checkOpen()
        ids.forEachIndexed { i, id ->
            if (id !in 0 until artifact.manifest.tokens.vocab) {
                throw PromptException(
                    "Token id $id at index $i is outside 0 … ${artifact.manifest.tokens.vocab - 1}; " +
                        "encode the text with this model's tokenizer.",
                )
            }
        }
        if (pos + ids.size > plan.ctx) {
            throw ContextFullException(
                "${ids.size} more tokens do not fit at position $pos of a context of ${plan.ctx}; " +
                    "shorten the prompt, start a new chat, or export a larger --ctx.",
            )
        }
    }

    private fun checkOpen() {
        if (closed) throw RuntimeFault("This session is closed; load the artifact again.")
    }

    /** The rings as they were after `tokens`; other tables keep those rows themselves. */
    private class Checkpoint(val tokens: IntArray, val written: Int, val rows: ByteBuffer)

    private companion object {
        const val CHECKPOINTS = 3
    }
}

/** How many ids `a` and `b` begin with alike. */
internal fun commonPrefix(a: IntArray, b: IntArray): Int {
    val most = minOf(a.size, b.size)
    return (0 until most).firstOrNull { a[it] != b[it] } ?: most
}

/** A growing list of ints without boxes. */
class IntList {
    private var items = IntArray(64)
    var size = 0
        private set

    operator fun get(i: Int) = items[i]

    fun add(item: Int) {
        if (size == items.size) items = items.copyOf(2 * size)
        items[size++] = item
    }

    fun addAll(more: IntArray) = more.forEach(::add)

    fun truncate(to: Int) {
        size = to
    }

    fun toArray(from: Int = 0, until: Int = size): IntArray = items.copyOfRange(from, until)
}
