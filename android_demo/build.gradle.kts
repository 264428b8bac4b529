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

    // The sources under src/test are asked by the Python tests, over another onnxruntime: build.sh host.
    sourceSets["test"].kotlin.setSrcDirs(emptyList<String>())
}

kotlin { jvmToolchain(17) }

dependencies {
    implementation("com.microsoft.onnxruntime:onnxruntime-android:1.29.0") // what build.sh tests with
    implementation("org.pytorch:executorch-android:1.5.1")
}
