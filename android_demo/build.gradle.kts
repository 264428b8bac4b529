// For Android Studio: both engines, from Google's Maven and Maven Central. Not built in CI.
plugins {
    id("com.android.application") version "8.13.0"
    id("org.jetbrains.kotlin.android") version "2.2.20"
}

android {
    namespace = "edgekv.app"
    compileSdk = 35

    defaultConfig {
        applicationId = "edgekv.app"
        minSdk = 24
        targetSdk = 34
        versionCode = 1
        versionName = "0.1.0"
        ndk { abiFilters += "arm64-v8a" }
    }

    buildTypes {
        release {
            isMinifyEnabled = true
            proguardFiles("proguard-rules.pro", "proguard-executorch.pro")
        }
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }

    sourceSets["main"].resources.srcDir(layout.buildDirectory.dir("replies"))
    sourceSets["main"].assets.srcDir("build/assets") // the model that build.sh may have bundled

    // The sources under src/test are asked by the Python tests, over another onnxruntime: build.sh host.
    sourceSets["test"].kotlin.setSrcDirs(emptyList<String>())
}

kotlin { jvmToolchain(17) }

// How models mark thoughts and tool calls: the table of the Python runtime.
val replies = tasks.register<Copy>("replies") {
    from("../runtime/replies.json")
    into(layout.buildDirectory.dir("replies"))
}
tasks.named("preBuild") { dependsOn(replies) }

dependencies {
    implementation("com.microsoft.onnxruntime:onnxruntime-android:1.29.0") // what build.sh tests with
    implementation("org.pytorch:executorch-android:1.5.1")
}
