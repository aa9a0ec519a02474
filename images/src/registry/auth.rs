//! What a registry asks for when it answers 401 (RFC 9110 §11.6.1, distribution-spec's *token authentication*): a
//! password with each request, or a token that another server gives for one.

use serde::Deserialize;

use super::base64;
use super::client::RegistryError;
use super::credentials::Credentials;
use super::http::{Body, Http, Request};
use super::url::{Url, encode};

/// Bytes of a token server's answer. Tokens have a few KiB.
const MAX_TOKEN_BYTES: u64 = 256 << 10;
/// The name that Docker's client gives itself at token servers, which some of them check.
const CLIENT_ID: &str = "docker";

/// A `WWW-Authenticate` field that can be met.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The best challenge among a field's values.
    pub(super) fn choose<'a>(values: impl Iterator<Item = &'a str>) -> Option<Challenge> {
        let known: Vec<Challenge> = values.filter_map(Challenge::parse).collect();
        let is_bearer = |challenge: &Challenge| matches!(challenge, Challenge::Bearer { .. });
        known.into_iter().max_by_key(is_bearer)
    }

    fn parse(value: &str) -> Option<Challenge> {
        let (scheme, rest) = value.trim().split_once(' ').unwrap_or((value.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Challenge::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service, mut scope) = (None, None, None);
        for (name, value) in parameters(rest) {
            match name.to_ascii_lowercase().as_str() {
                "realm" => realm = Some(value),
                "service" => service = Some(value),
                "scope" => scope = Some(value),
                _ => {}
            }
        }
        Some(Challenge::Bearer { realm: realm?, service, scope })
    }
}

/// `name=value` and `name="value"`, separated by commas.
fn parameters(mut text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    while let Some((name, rest)) = text.split_once('=') {
        let name = name.trim_matches([' ', ',', '\t']).to_owned();
        let (value, rest) = match rest.strip_prefix('"') {
            Some(quoted) => {
                let mut value = String::new();
                let mut letters = quoted.char_indices();
                let mut end = quoted.len();
                while let Some((at, letter)) = letters.next() {
                    match letter {
                        '"' => {
                            end = at + 1;
                            break;
                        }
                        '\\' => value.extend(letters.next().map(|(_, letter)| letter)),
                        letter => value.push(letter),
                    }
                }
                (value, quoted.get(end..).unwrap_or_default())
            }
            None => {
                let (value, rest) = rest.split_once(',').unwrap_or((rest, ""));
                (value.trim().to_owned(), rest)
            }
        };
        found.push((name, value));
        text = rest;
    }
    found
}

/// The value of `Authorization` by which a challenge is met.
pub(super) fn answer(
    http: &Http,
    challenge: Challenge,
    scopes: &[String],
    credentials: Option<&Credentials>,
    registry: &str,
) -> Result<String, RegistryError> {
    let login = || RegistryError::LoginNeeded { registry: registry.to_owned() };
    match challenge {
        Challenge::Basic => match credentials {
            Some(Credentials::Password { user, password }) => Ok(basic(user, password)),
            _ => Err(login()),
        },
        Challenge::Bearer { realm, service, scope } => {
            let url = Url::parse(&realm).ok_or_else(|| RegistryError::Realm { realm: shorten(&realm) })?;
            if !url.secure && !http.trusts(&url) {
                return Err(RegistryError::Realm { realm: shorten(&realm) });
            }
            let mut scopes = scopes.to_vec();
            // What was asked for may be more than what was foreseen.
            scopes.extend(scope.filter(|scope| !scopes.contains(scope)));
            let token = match credentials {
                Some(Credentials::IdentityToken(token)) => refresh(http, url, service, &scopes, token)?,
                Some(Credentials::Password { user, password }) => {
                    fetch(http, url, service, &scopes, Some(basic(user, password)), registry)?
                }
                None => fetch(http, url, service, &scopes, None, registry)?,
            };
            Ok(format!("Bearer {token}"))
        }
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64::encode(format!("{user}:{password}").as_bytes()))
}

fn shorten(text: &str) -> String {
    text.chars().take(200).collect()
}

/// <https://distribution.github.io/distribution/spec/auth/token/>
fn fetch(
    http: &Http,
    url: Url,
    service: Option<String>,
    scopes: &[String],
    authorization: Option<String>,
    registry: &str,
) -> Result<String, RegistryError> {
    let mut url = url;
    if let Some(service) = service {
        url = url.with_query("service", &service);
    }
    for scope in scopes {
        url = url.with_query("scope", scope);
    }
    let anonymous = authorization.is_none();
    let mut request = Request::new("GET", url);
    request.fields.extend(authorization.map(|value| ("Authorization", value)));
    let response = http.send(request)?;
    match response.status {
        200 => token_in(&response.url.to_string(), &response.read(MAX_TOKEN_BYTES)?),
        401 | 403 if anonymous => Err(RegistryError::LoginNeeded { registry: registry.to_owned() }),
        401 | 403 => Err(RegistryError::Credentials { registry: registry.to_owned() }),
        _ => Err(RegistryError::status("a token", response)),
    }
}

/// <https://distribution.github.io/distribution/spec/auth/oauth/>
fn refresh(
    http: &Http,
    url: Url,
    service: Option<String>,
    scopes: &[String],
    token: &str,
) -> Result<String, RegistryError> {
    let form = format!(
        "grant_type=refresh_token&client_id={CLIENT_ID}&service={}&scope={}&refresh_token={}",
        encode(&service.unwrap_or_default()),
        encode(&scopes.join(" ")),
        encode(token)
    );
    let mut request = Request::new("POST", url).field("Content-Type", "application/x-www-form-urlencoded");
    request.body = Body::Bytes(form.as_bytes());
    let response = http.send(request)?;
    match response.status {
        200 => token_in(&response.url.to_string(), &response.read(MAX_TOKEN_BYTES)?),
        _ => Err(RegistryError::status("a token", response)),
    }
}

pub(super) fn token_in(url: &str, content: &[u8]) -> Result<String, RegistryError> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
    }
    let answer: Option<Answer> = serde_json::from_slice(content).ok();
    let token = answer.and_then(|answer| answer.token.or(answer.access_token));
    token
        .filter(|token| !token.is_empty() && token.bytes().all(|byte| (b'!'..=b'~').contains(&byte)))
        .ok_or_else(|| RegistryError::Answer { url: url.to_owned(), problem: "no token in it".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenge_is_taken_apart() {
        let value = r#"Bearer realm="https://auth.docker.io/token",service="registry,\"x\"",scope="repository:a/b:pull,push""#;
        let expected = Challenge::Bearer {
            realm: "https://auth.docker.io/token".to_owned(),
            service: Some("registry,\"x\"".to_owned()),
            scope: Some("repository:a/b:pull,push".to_owned()),
        };
        assert_eq!(Challenge::parse(value), Some(expected));
        assert_eq!(Challenge::parse("basic realm=x"), Some(Challenge::Basic));
        assert_eq!(Challenge::parse("Bearer service=x"), None);
        assert_eq!(Challenge::parse("Negotiate"), None);
        let best = Challenge::choose(["Basic", "Bearer realm=https://a/, service=b"].into_iter());
        assert!(matches!(best, Some(Challenge::Bearer { service: Some(service), .. }) if service == "b"));
    }

    #[test]
    fn answer_without_a_token_that_fits_into_a_line_is_refused() {
        assert_eq!(token_in("u", br#"{"access_token":"abc"}"#).unwrap(), "abc");
        for bad in ["{}", "", r#"{"token":""}"#, r#"{"token":"a\r\nb"}"#] {
            assert!(token_in("u", bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
