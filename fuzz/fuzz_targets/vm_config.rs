//! A VM's configuration, as the VMM reads it.
#![no_main]

use cloche_vmm::VmConfig;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(config) = serde_json::from_slice::<VmConfig>(bytes) else { return };
    let valid = config.validate();
    if let Err(error) = &valid {
        assert!(!error.to_string().is_empty());
    }
    let again: VmConfig = serde_json::from_slice(&serde_json::to_vec(&config).unwrap()).unwrap();
    assert_eq!(again, config);
    assert_eq!(again.validate(), valid);
});
