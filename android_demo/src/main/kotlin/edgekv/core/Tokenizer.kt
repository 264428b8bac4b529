package edgekv.core

import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.channels.FileChannel

/**
 * A `tokenizer.json` of the BPE kind: the same ids as Hugging Face
 * `tokenizers` for every text, and the same text for all ids.
 */
class Tokenizer private constructor(file: File, private val bosId: Int?, private val addBos: Boolean) {
    private val vocabulary = Vocabulary()
    private val bpe: Bpe
    private val added: AddedTokens
    private val normalize: (String) -> String
    private val split: (String) -> List<String>
    private val join: (List<String>) -> String

    init {
        val json = map(file)
        val rest = LinkedHashMap<String, Any?>()
        val model = LinkedHashMap<String, Any?>()
        var merges = -1
        json.readObject { key ->
            if (key != "model") rest[key] = json.readValue() else json.readObject { name ->
                when (name) {
                    "vocab" -> readVocabulary(json)
                    "merges" -> merges = json.apply { peek() }.position.also { json.skip() }
                    else -> model[name] = json.readValue()
                }
            }
        }
        json.end()
        val f = Fields(model, file.name)
        if (f.textOrNull("type") != "BPE" || vocabulary.limit == 0 || merges < 0) refuse("is not of the BPE kind")
        for (name in listOf("dropout", "continuing_subword_prefix", "end_of_word_suffix")) {
            if (f.has(name) && f.textOrNull(name) != "") refuse("uses $name")
        }
        val unknown = f.textOrNull("unk_token")?.let { vocabulary.id(it) } ?: -1
        bpe = Bpe(
            vocabulary, unknown, f.flagOr("fuse_unk", false), f.flagOr("byte_fallback", false),
            f.flagOr("ignore_merges", false),
        )
        json.position = merges // only now is the vocabulary complete
        readMerges(json)
        val all = Fields(rest, file.name)
        added = AddedTokens(if (all.has("added_tokens")) all.listOfFields("added_tokens") else emptyList(), vocabulary)
        normalize = TokenizerSteps.normalizer(all.fieldsOrNull("normalizer"))
        split = TokenizerSteps.preTokenizer(all.fieldsOrNull("pre_tokenizer"))
        join = TokenizerSteps.decoder(all.fieldsOrNull("decoder"))
    }

    /** Text of the start token, for chat templates; empty when there is none. */
    val bosToken: String get() = bosId?.let(::token).orEmpty()

    /** The id of a token that is spelled `text`; null for none. */
    fun id(text: String): Int? = added.id(text) ?: vocabulary.id(text).takeIf { it >= 0 }

    /** Whether an id makes no text. */
    fun isSpecial(id: Int): Boolean = added.isSpecial(id)

    /** Text of one id as the vocabulary spells it; empty when it has none. */
    fun token(id: Int): String = added.text(id) ?: vocabulary.text(id) ?: ""

    /**
     * Ids of `text`, special tokens in it recognised.
     *
     * `start`: this is the start of the context, so the start token goes first unless `text` brings
     * it or the model was trained without one.
     */
    fun encode(text: String, start: Boolean = true): IntArray {
        val ids = IntList()
        added.split(text) { piece, id ->
            if (id >= 0) ids.add(id) else for (word in split(normalize(piece))) bpe.encode(word, ids)
        }
        val bare = ids.toArray()
        return if (start && addBos && bosId != null && bare.firstOrNull() != bosId) intArrayOf(bosId) + bare else bare
    }

    /** Text of `ids` without special tokens. */
    fun decode(ids: IntArray): String =
        join(ids.filterNot(added::isSpecial).mapNotNull { added.text(it) ?: vocabulary.text(it) })

    /** Text of `ids`, special tokens among it as the vocabulary spells them if `special`. */
    fun decode(ids: IntArray, special: Boolean): String {
        if (!special) return decode(ids)
        val stream = TextStream(this)
        val text = StringBuilder()
        for (id in ids) text.append(if (isSpecial(id)) stream.flush() + token(id) else stream.feed(id))
        return text.append(stream.flush()).toString()
    }

    private fun readVocabulary(json: JsonReader) = json.readObject { text ->
        val id = json.readValue() as? Long
        if (id == null || id > Int.MAX_VALUE || !vocabulary.add(text, id.toInt())) {
            throw JsonException("the token '${text.take(20)}' has no id of its own")
        }
    }

    private fun readMerges(json: JsonReader) = json.readArray {
        val (left, right) = if (json.peek() == '"') {
            val line = json.readString()
            Pair(line.substringBefore(' '), line.substringAfter(' ', ""))
        } else {
            val parts = ArrayList<String>(2)
            json.readArray { parts += json.readString() }
            Pair(parts.getOrElse(0) { "" }, parts.getOrElse(1) { "" })
        }
        if (!bpe.add(left, right)) {
            throw JsonException("the merge of '${left.take(20)}' and '${right.take(20)}' makes no token")
        }
    }

    companion object {
        /** @throws ArtifactException the artifact has no tokenizer, or one that this app does not read */
        fun of(artifact: Artifact): Tokenizer {
            val entry = artifact.manifest.tokenizer ?: throw ArtifactException(
                "${artifact.root.name} has no tokenizer (its weights came without one), so it takes no text.",
            )
            return read(artifact.file(entry.file), artifact.manifest.tokens.bos, entry.addBos)
        }

        fun read(file: File, bosId: Int?, addBos: Boolean): Tokenizer = try {
            Tokenizer(file, bosId, addBos)
        } catch (e: IOException) {
            throw ArtifactException("Cannot read $file: ${e.message}.", e)
        } catch (e: JsonException) {
            throw ArtifactException("$file is not a tokenizer (${e.message}); copy or export the artifact again.", e)
        }

        private fun map(file: File): JsonReader = RandomAccessFile(file, "r").use {
            JsonReader(it.channel.map(FileChannel.MapMode.READ_ONLY, 0, it.length()))
        }

        private fun refuse(what: String): Nothing =
            throw ArtifactException("tokenizer.json $what, which this app does not read; update the app.")
    }
}

/** Tokens that are found in the raw text before anything else: the longest that begins leftmost. */
internal class AddedTokens(entries: List<Fields>, vocabulary: Vocabulary) {
    private val ids = HashMap<String, Int>()
    private val texts = HashMap<Int, String>()
    private val special = HashSet<Int>()
    private val lengths = HashMap<Char, IntArray>() // by first character, longest first

    init {
        for (f in entries) {
            val text = f.text("content")
            if (listOf("single_word", "lstrip", "rstrip", "normalized").any { f.flagOr(it, false) }) {
                throw ArtifactException("tokenizer.json wants '$text' found in a way this app does not read; update the app.")
            }
            if (text.isEmpty()) continue
            val id = vocabulary.id(text).takeIf { it >= 0 } ?: f.int("id")
            ids[text] = id
            texts[id] = text
            if (f.flagOr("special", false)) special += id
        }
        for ((first, group) in ids.keys.groupBy { it[0] }) {
            lengths[first] = group.map { it.length }.distinct().sortedDescending().toIntArray()
        }
    }

    fun text(id: Int): String? = texts[id]

    fun id(text: String): Int? = ids[text]

    fun isSpecial(id: Int) = id in special

    /** Calls `onPiece` with every piece of `text` in order: a token and its id, or other text and -1. */
    fun split(text: String, onPiece: (String, Int) -> Unit) {
        var begin = 0
        var at = 0
        while (at < text.length) {
            val found = tokenAt(text, at)
            if (found == null) {
                at++
                continue
            }
            if (at > begin) onPiece(text.substring(begin, at), -1)
            onPiece(found, ids.getValue(found))
            at += found.length
            begin = at
        }
        if (begin < text.length) onPiece(text.substring(begin), -1)
    }

    private fun tokenAt(text: String, at: Int): String? {
        for (length in lengths[text[at]] ?: return null) {
            if (at + length > text.length) continue
            val candidate = text.substring(at, at + length)
            if (candidate in ids) return candidate
        }
        return null
    }
}

/**
 * Ids in, pieces of text out; joined, the pieces are the text of all ids. A piece is held back while
 * it ends inside a character.
 */
class TextStream(private val tokenizer: Tokenizer) {
    private val ids = IntList()
    private var context = 0 // where decoding starts: a decoder may treat the first id differently

    /** How many ids' text was given out. */
    var done = 0
        private set

    /** The text that `id` completes; empty while a character is unfinished. */
    fun feed(id: Int): String {
        ids.add(id)
        val piece = pending()
        if (piece.isEmpty() || piece.endsWith('\ufffd')) return ""
        context = done
        done = ids.size
        return piece
    }

    /** What was held back when the ids end, unfinished characters as U+FFFD. */
    fun flush(): String {
        val piece = pending()
        if (piece.endsWith('\ufffd')) context = ids.size else if (piece.isNotEmpty()) context = done
        done = ids.size
        return piece
    }

    private fun pending(): String {
        val given = tokenizer.decode(ids.toArray(context, done))
        return tokenizer.decode(ids.toArray(context)).drop(given.length)
    }
}
