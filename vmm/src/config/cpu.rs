//! What a guest sees of the host's processor.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A processor by name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuTemplate {
    /// The host's, with everything that its KVM offers.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// Level 2 of the x86-64 psABI: as of 2009, up to SSE 4.2.
    #[serde(rename = "x86-64-v2")]
    X8664V2,
    /// Level 3: as of 2015, up to AVX2.
    #[serde(rename = "x86-64-v3")]
    X8664V3,
    /// Level 4: AVX-512.
    #[serde(rename = "x86-64-v4")]
    X8664V4,
}

impl fmt::Display for CpuTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::X8664V2 => "x86-64-v2",
            Self::X8664V3 => "x86-64-v3",
            Self::X8664V4 => "x86-64-v4",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn template_of_unknown_name_is_refused_with_the_list() {
        let error = serde_json::from_str::<CpuTemplate>("\"skylake\"").unwrap_err().to_string();
        for template in [CpuTemplate::Host, CpuTemplate::X8664V2, CpuTemplate::X8664V3, CpuTemplate::X8664V4]
        {
            assert!(error.contains(&format!("`{template}`")), "{error}");
            let json = serde_json::to_string(&template).unwrap();
            assert_eq!(json, format!("\"{template}\""));
            assert_eq!(serde_json::from_str::<CpuTemplate>(&json).unwrap(), template);
        }
    }
}
