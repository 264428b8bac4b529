package edgekv.core

import java.io.Closeable
import java.io.File
import kotlin.math.floor

/**
 * What an artifact costs on this device at real depth: the document of `edge-kv bench --json`.
 *
 * As there, the state at a depth is real (prefilled, kept as a snapshot while the run lasts), and
 * the prompt is the same seeded ids. Unlike there, all depths share this one process, from the
 * shallowest up: `anon` and the peaks of a depth include what earlier ones left. What a phone does
 * not measure or know (bandwidth, and the floor it sets, the family of the model) is null.
 */
class Bench(
    private val artifact: Artifact,
    private val threads: Int,
    private val machine: Map<String, Any?>,
    private val scratch: File,
    private val open: () -> Session,
) {
    /** The prompt that is timed at each depth, the tokens decoded behind it, and how often. */
    var prompt = 512
    var tokens = 64
    var repeats = 3

    /**
     * Measures at every context of `depths`; `onProgress` is told what is being done.
     *
     * @throws ConfigException a depth outside 2 … ctx
     * @throws CancelledException the session was cancelled
     */
    fun run(depths: List<Int>, onProgress: (String) -> Unit): Map<String, Any?> {
        val ctx = artifact.plan.ctx
        depths.firstOrNull { it !in 2..ctx }?.let {
            throw ConfigException(
                "Depth $it is outside 2 … $ctx, the context ${artifact.manifest.name} was exported for; choose a smaller one.",
            )
        }
        onProgress("Loading")
        val begin = System.nanoTime()
        val (session, loaded) = watched(open)
        session.use {
            session.decode(promptIds(1)[0])
            val first = mapOf(
                "seconds" to session.stats.loadSeconds,
                "start_to_first_token" to (System.nanoTime() - begin) / 1e9,
                "huge_page_bytes" to 0,
            )
            val runs = depths.sorted().map { depth -> measure(session, depth, loaded, onProgress) + ("load" to first) }
            return document(session, runs)
        }
    }

    private fun measure(
        session: Session,
        depth: Int,
        loaded: Map<String, Long?>,
        onProgress: (String) -> Unit,
    ): Map<String, Any?> {
        val ahead = minOf(prompt, depth)
        val start = depth - ahead
        val steps = maxOf(1, minOf(tokens, artifact.plan.ctx - start, ahead))
        val ids = promptIds(depth)
        val held = File(scratch, "bench.kv")
        onProgress("$depth tokens: filling")
        session.feed(ids.copyOf(start))
        if (start > 0 && session.canSnapshot) session.snapshot(held)

        fun atDepth() {
            when {
                start == 0 -> session.reset()
                session.canSnapshot -> session.restore(held)
                else -> session.feed(ids.copyOf(start))
            }
        }
        try {
            onProgress("$depth tokens: reading a prompt")
            val (prefills, prefillMemory) = watched {
                List(repeats + 1) {
                    atDepth()
                    seconds { session.prefill(ids.copyOfRange(start, depth)) }
                }
            }
            onProgress("$depth tokens: decoding")
            val (decodes, decodeMemory) = watched {
                List(repeats + 1) {
                    atDepth()
                    List(steps) { seconds { session.decode(ids[0]) } }
                }
            }
            val latencies = decodes.drop(1).flatten().sorted()
            val typical = percentile(prefills.drop(1).sorted(), 50)
            val p50 = percentile(latencies, 50)
            return mapOf(
                "engine" to session.engine,
                "ctx" to depth,
                "filled" to if (start == 0) "empty" else "prefilled in this run",
                "depth" to start,
                "prefill" to mapOf("tokens" to ahead, "seconds" to prefills.drop(1), "rate" to ahead / typical),
                "decode" to mapOf(
                    "tokens" to latencies.size,
                    "rate" to 1 / latencies.average(),
                    "seconds" to mapOf("p50" to p50, "p95" to percentile(latencies, 95), "p99" to percentile(latencies, 99)),
                    "first_after_prefill" to decodes[0][0],
                    "several" to null, // the app decodes one token at a time
                ),
                "first_token" to typical + p50,
                "memory" to mapOf("load" to loaded, "prefill" to prefillMemory, "decode" to decodeMemory),
                "roofline" to null,
            )
        } finally {
            held.delete()
        }
    }

    private fun document(session: Session, runs: List<Map<String, Any?>>): Map<String, Any?> {
        val manifest = artifact.manifest
        return mapOf(
            "schema_version" to SCHEMA_VERSION,
            "edge_kv" to manifest.madeBy,
            "artifact" to mapOf(
                "name" to manifest.name, "model" to null, "layers" to null, "ctx" to artifact.plan.ctx,
                "chunk" to artifact.plan.chunk, "kv" to artifact.plan.kv, "quant" to manifest.quant,
            ),
            "machine" to machine,
            "conditions" to mapOf(
                "threads" to threads, "cache" to session.packed, "huge_pages" to false,
                "prompt" to prompt, "tokens" to tokens, "repeats" to repeats, "fill" to "prefill", "load_average" to null,
            ),
            "bandwidth" to null,
            "plan" to emptyList<Any>(), // there is none for a phone
            "failures" to emptyList<Any>(),
            "runs" to runs,
        )
    }

    /** The ids every measurement feeds, those of `edge_kv.runtime.bench.prompt_ids`. */
    private fun promptIds(count: Int) = NumpyRandom(0).integers(artifact.manifest.tokens.vocab, count)

    private fun seconds(work: () -> Unit): Double {
        val begin = System.nanoTime()
        work()
        return (System.nanoTime() - begin) / 1e9
    }

    private companion object {
        const val SCHEMA_VERSION = 1

        /** As numpy's: between the two nearest of the sorted values. */
        fun percentile(sorted: List<Double>, percent: Int): Double {
            val at = percent / 100.0 * (sorted.size - 1)
            val low = floor(at).toInt()
            val high = minOf(low + 1, sorted.lastIndex)
            return sorted[low] + (sorted[high] - sorted[low]) * (at - low)
        }
    }
}

/** Runs `work`, with the memory that is held at its end and the peaks while it ran. */
private fun <T> watched(work: () -> T): Pair<T, Map<String, Long?>> {
    val ownPeak = MemoryMeter.resetPeak()
    val watch = MemoryWatch()
    val result = watch.use { work() }
    val held = MemoryMeter.read(pss = true)
    return result to mapOf(
        "anon" to held.anon,
        "anon_peak" to held.anon?.let { maxOf(it, watch.anonPeak) },
        "file" to held.file,
        "rss_peak" to if (ownPeak) held.peak else null,
        "rss_peak_so_far" to held.peak,
        "pss" to held.pss,
        "cgroup_peak" to null,
    )
}

/** Looks at anonymous memory, whose peak the system does not keep, until it is closed. */
private class MemoryWatch : Closeable {
    @Volatile private var running = true
    var anonPeak = 0L
        private set
    private val looker = Thread {
        while (running) {
            anonPeak = maxOf(anonPeak, MemoryMeter.read(pss = false).anon ?: 0)
            Thread.sleep(SAMPLE_MILLISECONDS)
        }
    }.apply {
        isDaemon = true
        start()
    }

    override fun close() {
        running = false
        looker.join()
    }

    private companion object {
        const val SAMPLE_MILLISECONDS = 20L
    }
}
