package edgekv.app

import android.os.Handler
import android.os.HandlerThread
import edgekv.core.Memory
import edgekv.core.MemoryMeter

/** Reads the meter once a second while a screen is visible, off the main thread: PSS walks all maps. */
class MemorySampler {
    @Volatile var samples: List<Memory> = emptyList()
        private set
    private var thread: HandlerThread? = null

    fun start() {
        val started = HandlerThread("memory").apply { start() }
        thread = started
        val handler = Handler(started.looper)
        handler.post(object : Runnable {
            override fun run() {
                samples = (samples + MemoryMeter.read(pss = true)).takeLast(MemoryGraph.CAPACITY)
                handler.postDelayed(this, PERIOD_MILLISECONDS)
            }
        })
    }

    fun stop() {
        thread?.quit()
        thread = null
    }

    private companion object {
        const val PERIOD_MILLISECONDS = 1000L
    }
}
