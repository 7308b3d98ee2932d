#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| refit_tests::fuzz::metadata(data));
