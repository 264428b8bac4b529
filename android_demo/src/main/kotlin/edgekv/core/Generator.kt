package edgekv.core

/** Why a reply ended. */
enum class Finish { STOP, LENGTH, FULL, CALLS, CANCELLED }

/** How replies are generated; sampling that is left out is the checkpoint's own. */
data class Options(
    val maxNewTokens: Int = 1024,
    val temperature: Double? = null,
    val topK: Int? = null,
    val topP: Double? = null,
    val minP: Double? = null,
    val repetitionPenalty: Double? = null,
    val seed: Long? = null,
    /** The template variable `enable_thinking`; null leaves it to the template. */
    val think: Boolean? = null,
) {
    /** `default` with what is set here. */
    fun sampling(default: Sampling) = Sampling(
        temperature ?: default.temperature, topK ?: default.topK, topP ?: default.topP, minP ?: default.minP,
        repetitionPenalty ?: default.repetitionPenalty,
    )
}

/**
 * Continues `prompt` by up to `maxNewTokens` ids and says why it ended; a stop id is not given out.
 *
 * What the session already holds of `prompt` is kept, and the rings at the lengths in `at`; `onRead` is
 * told how much that was. A context of ctx tokens yields at most `ctx - prompt.size + 1` ids: the
 * last is not fed.
 *
 * @throws PromptException `prompt` is empty or holds something that is not a token id
 * @throws ContextFullException it does not fit the context
 * @throws CancelledException the session was cancelled
 */
fun generate(
    session: Session,
    prompt: IntArray,
    maxNewTokens: Int,
    sampler: Sampler,
    stop: Set<Int>,
    at: Collection<Int> = emptyList(),
    onRead: (Int) -> Unit = {},
    onToken: (Int) -> Unit,
): Finish {
    if (prompt.isEmpty()) throw PromptException("The prompt is empty; give at least one token (the start token will do).")
    val ctx = session.plan.ctx
    if (prompt.size > ctx) {
        throw ContextFullException(
            "The prompt has ${prompt.size} tokens, the context $ctx; shorten it, start a new chat, or export with a " +
                "larger --ctx.",
        )
    }
    if (maxNewTokens == 0) return Finish.LENGTH
    val history = IntList().apply { addAll(prompt) }
    onRead(session.feed(prompt.copyOf(prompt.size - 1), at))
    repeat(maxNewTokens) {
        if (history.size > ctx) return Finish.FULL
        val id = sampler.choose(session.decode(history[history.size - 1]), history::toArray)
        if (id in stop) return Finish.STOP
        history.add(id)
        onToken(id)
    }
    return Finish.LENGTH
}
