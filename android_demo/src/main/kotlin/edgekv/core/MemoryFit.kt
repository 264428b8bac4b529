package edgekv.core

import java.util.Locale

/** Whether an artifact fits this device: its own plan against the memory there is. */
object MemoryFit {
    private const val FIRST_LOAD = "first load"
    private const val TOKENIZER = "tokenizer"

    /**
     * Peak anonymous bytes the plan expects: what has to fit, since the system cannot take it back.
     *
     * The plan counts the tokenizer of the Python runtime, which is large; this one's is not.
     */
    private fun needed(manifest: Manifest, packed: Boolean): Long {
        val phases = manifest.phases - if (packed) setOf(FIRST_LOAD, TOKENIZER) else setOf(TOKENIZER)
        val peak = phases.values.maxOfOrNull { it.anon } ?: (manifest.plan.bytes + manifest.weightFile)
        return peak - manifest.tokenizerBytes
    }

    /**
     * `packed`: weights were packed for this device before, which took more than later loads do.
     *
     * @throws MemoryLimitException the plan does not fit into `available` bytes
     */
    fun check(manifest: Manifest, available: Long?, packed: Boolean) {
        val needed = needed(manifest, packed)
        if (available == null || needed <= available) return
        throw MemoryLimitException(
            "${manifest.name} needs ${megabytes(needed)} of memory by its plan, ${megabytes(available)} are available; " +
                "close other apps, or export with a smaller --ctx, --quant int4 or --kv int8.",
        )
    }

    /** `1,234 MB`. */
    fun megabytes(bytes: Long): String = String.format(Locale.US, "%,d MB", bytes / 1_000_000)
}
