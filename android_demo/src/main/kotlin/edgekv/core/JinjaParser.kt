package edgekv.core

import edgekv.core.Jinja.Arguments
import edgekv.core.Jinja.Block
import edgekv.core.Jinja.Callable
import edgekv.core.Jinja.Expression
import edgekv.core.Jinja.Fault
import edgekv.core.Jinja.Namespace
import edgekv.core.Jinja.Scope
import edgekv.core.Jinja.Statement
import edgekv.core.JinjaToken.Kind

/** Reads a template into closures; precedence and scoping are Jinja's. */
internal class JinjaParser(source: String) {
    private val tokens = JinjaLexer(source).tokens()
    private var at = 0
    private val token get() = tokens[at]

    /** @throws Fault naming the line and what is outside the supported part of Jinja */
    fun parse(): Block = block().also { if (token.kind != Kind.END) fail("'${tokens[at + 1].text}' has nothing to end") }

    /** Statements up to one of `ends`, whose keyword is the next token after its opening. */
    private fun block(vararg ends: String): Block {
        val statements = ArrayList<Statement>()
        while (token.kind != Kind.END) {
            when (token.kind) {
                Kind.TEXT -> {
                    val text = next().text
                    statements += Statement { _, out -> out.append(text) }
                }
                Kind.PRINT -> {
                    next()
                    val shown = expression()
                    close()
                    statements += Statement { scope, out -> out.append(Jinja.text(shown.value(scope))) }
                }
                else -> {
                    if (tokens[at + 1].text.let { it in ends || it.startsWith("end") || it == "else" || it == "elif" }) break
                    next()
                    statements += statement()
                }
            }
        }
        return Block(statements)
    }

    private fun statement(): Statement = when (val word = next().text) {
        "set" -> set()
        "if" -> condition()
        "for" -> loop()
        "macro" -> macro()
        "generation" -> { // marks what was generated, for training
            close()
            block("endgeneration").also { expectTag("endgeneration") }
        }
        "break", "continue" -> {
            close()
            Statement { _, _ -> throw Jump(word == "break") }
        }
        else -> fail("the statement '$word' is not supported")
    }

    private fun set(): Statement {
        val name = name()
        if (token.text == ",") return unpacked(name)
        val member = if (accept(".")) name() else null
        val value = if (accept("=")) listed().also { close() } else captured()
        return Statement { scope, _ ->
            val result = value.value(scope)
            if (member == null) {
                scope[name] = result
            } else {
                (scope[name] as? Namespace ?: throw Fault("'$name' is not a namespace")).values[member] = result
            }
        }
    }

    /** `{% set a, b = … %}`. */
    private fun unpacked(first: String): Statement {
        val names = arrayListOf(first)
        while (accept(",")) names += name()
        expect("=")
        val value = listed()
        close()
        return Statement { scope, _ -> bound(names, value.value(scope)).forEach { (name, item) -> scope[name] = item } }
    }

    /** `{% set x %}…{% endset %}`: the text in between. */
    private fun captured(): Expression {
        close()
        val body = block("endset")
        expectTag("endset")
        return Expression { scope -> StringBuilder().also { body.run(scope, it) }.toString() }
    }

    private fun bound(names: List<String>, item: Any?): Map<String, Any?> {
        if (names.size == 1) return mapOf(names[0] to item)
        val parts = Jinja.items(item)
        if (parts.size != names.size) throw Fault("${parts.size} items for ${names.size} names")
        return names.zip(parts).toMap()
    }

    private fun condition(): Statement {
        val branches = ArrayList<Pair<Expression, Block>>()
        var otherwise: Block? = null
        do {
            val test = expression()
            close()
            branches += Pair(test, block("elif", "else", "endif"))
        } while (acceptTag("elif", closing = false))
        if (acceptTag("else")) otherwise = block("endif")
        expectTag("endif")
        return Statement { scope, out ->
            (branches.firstOrNull { Jinja.truth(it.first.value(scope)) }?.second ?: otherwise)?.run(scope, out)
        }
    }

    private fun loop(): Statement {
        val names = arrayListOf(name())
        while (accept(",")) names += name()
        expect("in")
        val source = or()
        val only = if (accept("if")) or() else null
        close()
        val body = block("else", "endfor")
        val otherwise = if (acceptTag("else")) block("endfor") else null
        expectTag("endfor")
        return Statement { scope, out ->
            val all = Jinja.items(source.value(scope))
                .filter { only == null || Jinja.truth(only.value(Scope(bound(names, it), scope))) }
            try {
                all.forEachIndexed { i, item ->
                    val loop = mapOf(
                        "index" to i + 1L, "index0" to i.toLong(), "first" to (i == 0), "last" to (i == all.lastIndex),
                        "length" to all.size.toLong(),
                        "revindex" to (all.size - i).toLong(), "revindex0" to (all.lastIndex - i).toLong(),
                        "previtem" to all.getOrElse(i - 1) { Jinja.Undefined },
                        "nextitem" to all.getOrElse(i + 1) { Jinja.Undefined },
                    )
                    try {
                        body.run(Scope(bound(names, item) + ("loop" to loop), scope), out)
                    } catch (jump: Jump) {
                        if (jump.out) throw jump
                    }
                }
            } catch (jump: Jump) {
                // the loop was left
            }
            if (all.isEmpty()) otherwise?.run(scope, out)
        }
    }

    private fun macro(): Statement {
        val name = name()
        val parameters = ArrayList<Pair<String, Expression?>>()
        expect("(")
        while (!accept(")")) {
            parameters += Pair(name(), if (accept("=")) expression() else null)
            if (!accept(",") && token.text != ")") fail("expected ')'")
        }
        close()
        val body = block("endmacro")
        expectTag("endmacro")
        return Statement { scope, _ ->
            scope[name] = Callable { given ->
                if (given.positional.size > parameters.size) throw Fault("'$name' takes ${parameters.size} arguments")
                val bound = parameters.mapIndexed { i, (parameter, default) ->
                    parameter to when {
                        i < given.positional.size -> given.positional[i]
                        parameter in given.named -> given.named[parameter]
                        else -> default?.value(scope) ?: Jinja.Undefined
                    }
                }
                StringBuilder().also { body.run(Scope(bound.toMap(), scope.root), it) }.toString()
            }
        }
    }

    /** An expression, or several with commas between them. */
    private fun listed(): Expression {
        val parts = arrayListOf(expression())
        while (accept(",")) parts += expression()
        return if (parts.size == 1) parts[0] else Expression { s -> parts.map { it.value(s) } }
    }

    private fun expression(): Expression {
        val value = or()
        if (!accept("if")) return value
        val test = or()
        val otherwise = if (accept("else")) expression() else Expression { Jinja.Undefined }
        return Expression { if (Jinja.truth(test.value(it))) value.value(it) else otherwise.value(it) }
    }

    private fun or(): Expression {
        var left = and()
        while (accept("or")) {
            val (a, b) = Pair(left, and())
            left = Expression { s -> a.value(s).let { if (Jinja.truth(it)) it else b.value(s) } }
        }
        return left
    }

    private fun and(): Expression {
        var left = not()
        while (accept("and")) {
            val (a, b) = Pair(left, not())
            left = Expression { s -> a.value(s).let { if (Jinja.truth(it)) b.value(s) else it } }
        }
        return left
    }

    private fun not(): Expression {
        if (!accept("not")) return comparison()
        val value = not()
        return Expression { !Jinja.truth(value.value(it)) }
    }

    private fun comparison(): Expression {
        val first = sum()
        val rest = ArrayList<Pair<(Any?, Any?) -> Boolean, Expression>>()
        while (true) {
            val test: (Any?, Any?) -> Boolean = when {
                accept("==") -> Jinja::equal
                accept("!=") -> { a, b -> !Jinja.equal(a, b) }
                accept("<=") -> { a, b -> Jinja.compare(a, b) <= 0 }
                accept(">=") -> { a, b -> Jinja.compare(a, b) >= 0 }
                accept("<") -> { a, b -> Jinja.compare(a, b) < 0 }
                accept(">") -> { a, b -> Jinja.compare(a, b) > 0 }
                accept("in") -> { a, b -> Jinja.contains(b, a) }
                token.text == "not" && tokens[at + 1].text == "in" -> {
                    at += 2
                    { a, b -> !Jinja.contains(b, a) }
                }
                else -> break
            }
            rest += Pair(test, sum())
        }
        if (rest.isEmpty()) return first
        return Expression { scope ->
            var left = first.value(scope)
            rest.all { (test, right) ->
                val value = right.value(scope)
                test(left, value).also { left = value }
            }
        }
    }

    private fun sum(): Expression {
        var left = joined()
        while (true) {
            val (a, minus) = Pair(left, if (accept("+")) false else if (accept("-")) true else return left)
            val b = joined()
            left = Expression {
                val (x, y) = Pair(a.value(it), b.value(it))
                if (minus) Jinja.arithmetic(x, y, Long::minus, Double::minus) else Jinja.plus(x, y)
            }
        }
    }

    private fun joined(): Expression {
        var left = product()
        while (accept("~")) {
            val (a, b) = Pair(left, product())
            left = Expression { Jinja.text(a.value(it)) + Jinja.text(b.value(it)) }
        }
        return left
    }

    private fun product(): Expression {
        var left = unary()
        while (true) {
            val a = left
            val operation: (Any?, Any?) -> Any? = when {
                accept("*") -> { x, y -> Jinja.times(x, y) }
                accept("/") -> { x, y -> Jinja.arithmetic(x, y, ::divide, Double::div) }
                accept("//") -> { x, y -> Jinja.arithmetic(x, y, ::floorDivide) { p, q -> Math.floor(p / q) } }
                accept("%") -> { x, y ->
                    Jinja.arithmetic(x, y, { p, q -> p - q * floorDivide(p, q) }) { p, q -> p - q * Math.floor(p / q) }
                }
                else -> return left
            }
            val b = unary()
            left = Expression { operation(a.value(it), b.value(it)) }
        }
    }

    private fun divide(a: Long, b: Long): Double = if (b == 0L) throw Fault("a division by zero") else a.toDouble() / b

    private fun floorDivide(a: Long, b: Long): Long {
        if (b == 0L) throw Fault("a division by zero")
        return a / b - if (a % b != 0L && (a < 0) != (b < 0)) 1 else 0
    }

    private fun unary(): Expression {
        if (accept("-")) {
            val value = postfix(primary())
            return Expression { Jinja.arithmetic(0L, value.value(it), Long::minus, Double::minus) }
        }
        return filtered(postfix(primary()))
    }

    private fun primary(): Expression {
        val word = next()
        return when (word.kind) {
            Kind.STRING -> {
                val text = StringBuilder(word.text)
                while (token.kind == Kind.STRING) text.append(next().text)
                constant(text.toString())
            }
            Kind.INTEGER -> constant(word.text.toLongOrNull() ?: fail("the number ${word.text} is too large"))
            Kind.FLOAT -> constant(word.text.toDouble())
            Kind.NAME -> when (word.text) {
                "true", "True" -> constant(true)
                "false", "False" -> constant(false)
                "none", "None" -> constant(null)
                else -> Expression { it[word.text] }
            }
            else -> when (word.text) {
                "(" -> parenthesis()
                "[" -> listOf("]").let { expressions("]") }.let { parts -> Expression { s -> parts.map { it.value(s) } } }
                "{" -> mapping()
                else -> fail("'${word.text}' is not a value")
            }
        }
    }

    private fun constant(value: Any?) = Expression { value }

    private fun parenthesis(): Expression {
        val first = expression()
        if (accept(")")) return first
        expect(",")
        val parts = listOf(first) + expressions(")")
        return Expression { s -> parts.map { it.value(s) } }
    }

    private fun expressions(end: String): List<Expression> {
        val parts = ArrayList<Expression>()
        while (!accept(end)) {
            parts += expression()
            if (!accept(",") && token.text != end) fail("expected '$end'")
        }
        return parts
    }

    private fun mapping(): Expression {
        val parts = ArrayList<Pair<Expression, Expression>>()
        while (!accept("}")) {
            val key = expression()
            expect(":")
            parts += Pair(key, expression())
            if (!accept(",") && token.text != "}") fail("expected '}'")
        }
        return Expression { s -> parts.associate { (k, v) -> k.value(s) to v.value(s) } }
    }

    private fun postfix(start: Expression): Expression {
        var left = start
        while (token.kind == Kind.SYMBOL) {
            val a = left
            left = when {
                accept(".") -> name().let { name -> Expression { Jinja.attribute(a.value(it), name) } }
                accept("[") -> subscript(a)
                accept("(") -> arguments().let { given -> Expression { Jinja.call(a.value(it), given(it)) } }
                else -> return left
            }
        }
        return left
    }

    private fun subscript(a: Expression): Expression {
        val first = if (token.text == ":" && token.kind == Kind.SYMBOL) null else expression()
        if (accept("]")) return Expression { Jinja.item(a.value(it), first!!.value(it)) }
        expect(":")
        val last = if (token.text in "]:" && token.kind == Kind.SYMBOL) null else expression()
        val step = if (accept(":") && token.text != "]") expression() else null
        expect("]")
        return Expression { Jinja.slice(a.value(it), first?.value(it), last?.value(it), step?.value(it)) }
    }

    private fun arguments(): (Scope) -> Arguments {
        val positional = ArrayList<Expression>()
        val named = LinkedHashMap<String, Expression>()
        while (!accept(")")) {
            if (token.kind == Kind.NAME && tokens[at + 1].text == "=") {
                val name = name()
                next()
                named[name] = expression()
            } else {
                positional += expression()
            }
            if (!accept(",") && token.text != ")") fail("expected ')'")
        }
        return { s -> Arguments(positional.map { it.value(s) }, named.mapValues { it.value.value(s) }) }
    }

    private fun argument(value: Expression): (Scope) -> Arguments = { s -> Arguments(listOf(value.value(s)), emptyMap()) }

    private fun filtered(start: Expression): Expression {
        var left = start
        while (true) {
            val a = left
            left = when {
                accept("|") -> {
                    val name = name()
                    val filter = JinjaLibrary.FILTERS[name] ?: fail("the filter '$name' is not supported")
                    val given: (Scope) -> Arguments = if (accept("(")) arguments() else { _ -> NOTHING }
                    Expression { filter(a.value(it), given(it)) }
                }
                accept("is") -> {
                    val negated = accept("not")
                    val name = next().text
                    val test = JinjaLibrary.TESTS[name.lowercase()] ?: fail("the test '$name' is not supported")
                    val bare = token.kind == Kind.STRING || token.kind == Kind.INTEGER || token.text == "[" ||
                        token.kind == Kind.NAME && token.text !in AFTER_TEST
                    val given: (Scope) -> Arguments = when {
                        accept("(") -> arguments()
                        bare -> argument(postfix(primary()))
                        else -> { _ -> NOTHING }
                    }
                    Expression { test(a.value(it), given(it)) != negated }
                }
                else -> return left
            }
        }
    }

    private fun next(): JinjaToken = tokens[at].also { if (at < tokens.lastIndex) at++ }

    private fun name(): String = if (token.kind == Kind.NAME) next().text else fail("expected a name, not '${token.text}'")

    private fun accept(text: String): Boolean {
        val found = token.text == text && (token.kind == Kind.SYMBOL || token.kind == Kind.NAME)
        if (found) at++
        return found
    }

    private fun expect(text: String) {
        if (!accept(text)) fail("expected '$text', not '${token.text}'")
    }

    private fun close() {
        if (next().kind != Kind.CLOSE) fail("'${tokens[at - 1].text}' is not expected here")
    }

    private fun acceptTag(word: String, closing: Boolean = true): Boolean {
        val found = token.kind == Kind.STATEMENT && tokens[at + 1].text == word
        if (found) at += 2
        if (found && closing) close()
        return found
    }

    private fun expectTag(word: String) {
        if (!acceptTag(word)) fail("expected '$word'")
    }

    private fun fail(what: String): Nothing = throw Fault("line ${token.line}: $what")

    /** `break` and `continue`. */
    private class Jump(val out: Boolean) : RuntimeException()

    private companion object {
        val NOTHING = Arguments(emptyList(), emptyMap())

        /** Words that go on behind a test without an argument. */
        val AFTER_TEST = setOf("and", "or", "not", "if", "else", "in", "is")
    }
}
