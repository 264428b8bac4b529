package edgekv.core

/** What an artifact needs of this device's memory. */
object MemoryFit {
    private const val ACTIVATIONS = 2 // of what a chunk of a prompt holds: onnxruntime's own operators hold more
    private const val LOGITS = 4 // f32 rows of logits
    private const val PROGRAM = 20 // bytes of heap for each byte of a program's file

    /**
     * Anonymous bytes for a full context: what has to fit, since the system cannot take it back. The
     * costs are those of `edge_kv.memory`, rounded up.
     *
     * `packed`: weights were packed for this device before and are mapped. Without that onnxruntime
     * brings them into the order of its kernels on the heap.
     */
    fun needed(manifest: Manifest, packed: Boolean): Long {
        val (plan, needs) = Pair(manifest.plan, manifest.needs)
        val programs = manifest.backends.values.flatMap { it.programs.values }.distinctBy { it.file }
        val code = programs.sumOf { manifest.files[it.file]?.size ?: 0 }
        val step = 4L * (ACTIVATIONS.toLong() * plan.chunk * needs.row + LOGITS.toLong() * manifest.tokens.vocab)
        return plan.touched(plan.ctx) + step + PROGRAM * code + if (packed) 0 else needs.weights
    }
}
