//! What a registry has: tags of a repository, and repositories by a word in their names, where it tells.
//!
//! Docker's own registry has a search of its own, from before the API that all have now; some others have it, too. The
//! API itself can only list all repositories, and few registries let everybody do that.

use serde::Deserialize;
use serde_json::Value;

use super::client::{RegistryError, RegistryOptions, Repository};
use super::http::Response;
use super::url::Url;
use crate::reference::{Reference, ReferenceError};

/// Where Docker's own registry is searched.
const DOCKER_SEARCH: &str = "https://index.docker.io/v1/search";
/// Bytes of one answer.
const MAX_PAGE_BYTES: u64 = 4 << 20;
/// What is asked for at once. A registry may give less.
const PAGE: &str = "1000";
const MAX_PAGES: usize = 1000;
/// Tags or repositories that are read at most.
const MAX_NAMES: usize = 100_000;

/// A repository that was found.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Found {
    /// Its name, as `pull` takes it.
    pub name: String,
    /// What its owner says of it.
    pub description: String,
    /// How many like it, where that is known.
    pub stars: u64,
    /// Whether it is one of Docker's own.
    pub official: bool,
}

/// Why nothing could be searched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SearchError {
    /// It is no host.
    #[error(transparent)]
    Name(#[from] ReferenceError),
    /// The registry did not do its part.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// It has no such thing.
    #[error("{registry} offers no search, nor a list of its repositories ({status})")]
    NotOffered {
        /// Its host.
        registry: String,
        /// What it answered.
        status: u16,
    },
}

impl Repository {
    /// All tags (distribution-spec: spec.md#listing-tags).
    pub fn tags(&self) -> Result<Vec<String>, RegistryError> {
        #[derive(Deserialize)]
        struct Page {
            tags: Option<Vec<String>>,
        }
        let mut tags = Vec::new();
        self.pages(self.url("tags/list").with_query("n", PAGE), |response| {
            if response.status != 200 {
                return Err(RegistryError::status(format!("the tags of {}", self.path()), response));
            }
            let page: Page = parsed(response)?;
            tags.extend(page.tags.unwrap_or_default());
            Ok(tags.len())
        })?;
        Ok(tags)
    }

    /// Reads one page after the other; `take` tells how many names there are by then.
    fn pages(
        &self,
        first: Url,
        mut take: impl FnMut(Response<'_>) -> Result<usize, RegistryError>,
    ) -> Result<(), RegistryError> {
        let mut next = Some(first);
        for _ in 0..MAX_PAGES {
            let Some(url) = next else { return Ok(()) };
            let response = self.ask("GET", &url, &[])?;
            let following =
                response.field("link").and_then(next_page).and_then(|link| response.url.join(link));
            next = following.filter(|next| next.has_origin_of(&url) && *next != url);
            if take(response)? > MAX_NAMES {
                let problem = format!("more than {MAX_NAMES} names");
                return Err(RegistryError::Answer { url: url.to_string(), problem });
            }
        }
        Err(RegistryError::Answer {
            url: self.domain().to_owned(),
            problem: format!("more than {MAX_PAGES} pages"),
        })
    }
}

/// The URL in `<URL>; rel="next"` (RFC 8288 §3).
fn next_page(link: &str) -> Option<&str> {
    let (url, parameters) = link.strip_prefix('<')?.split_once('>')?;
    parameters.replace(['"', ' '], "").contains("rel=next").then_some(url)
}

fn parsed<T: serde::de::DeserializeOwned>(response: Response<'_>) -> Result<T, RegistryError> {
    let url = response.url.to_string();
    let content = response.read(MAX_PAGE_BYTES)?;
    serde_json::from_slice(&content)
        .map_err(|_| RegistryError::Answer { url, problem: "JSON that is not what it should be".to_owned() })
}

/// Looks for repositories: for `WORD` on docker.io, for `HOST/WORD` there. At most `limit`, as the registry orders them.
pub fn search(term: &str, limit: usize, options: &RegistryOptions) -> Result<Vec<Found>, SearchError> {
    let (domain, word) = match term.split_once('/') {
        Some((host, word)) if is_host(host) => (host, word),
        _ => ("docker.io", term),
    };
    let anywhere: Reference = format!("{domain}/cloche/search").parse()?;
    let registry = Repository::open_registry(&anywhere, "registry:catalog:*", options)?;
    let is_docker = domain == "docker.io";
    let old = if is_docker { Url::parse(DOCKER_SEARCH) } else { Some(registry.base().at("/v1/search")) };
    if let Some(url) = old {
        let url = url.with_query("q", word).with_query("n", &limit.to_string());
        let answered = registry.ask("GET", &url, &[]);
        match answered {
            Ok(response) if response.status == 200 => match parsed::<Value>(response) {
                Ok(results) => return Ok(found_by_search(&results, domain, limit)),
                Err(error) if is_docker => return Err(error.into()),
                Err(_) => {}
            },
            Ok(response) if is_docker => return Err(RegistryError::status("a search", response).into()),
            Err(error) if is_docker => return Err(error.into()),
            // Most have none.
            Ok(_) | Err(_) => {}
        }
    }
    catalog(&registry, domain, word, limit)
}

fn is_host(text: &str) -> bool {
    text.contains(['.', ':']) || text == "localhost"
}

fn found_by_search(results: &Value, domain: &str, limit: usize) -> Vec<Found> {
    let results = results.get("results").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let found = results.iter().filter_map(|result| {
        let text = |key: &str| result.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let name = Some(text("name")).filter(|name| !name.is_empty())?;
        Some(Found {
            name: if domain == "docker.io" { name } else { format!("{domain}/{name}") },
            description: text("description"),
            stars: result.get("star_count").and_then(Value::as_u64).unwrap_or(0),
            official: result.get("is_official").and_then(Value::as_bool).unwrap_or(false),
        })
    });
    found.take(limit).collect()
}

/// Looks through all names (distribution's API: `_catalog`).
fn catalog(registry: &Repository, domain: &str, word: &str, limit: usize) -> Result<Vec<Found>, SearchError> {
    #[derive(Deserialize)]
    struct Page {
        repositories: Option<Vec<String>>,
    }
    let word = word.to_ascii_lowercase();
    let (mut names, mut refused, mut count) = (Vec::new(), None, 0);
    registry.pages(registry.base().at("/v2/_catalog").with_query("n", PAGE), |response| {
        match response.status {
            200 => {}
            401 | 403 | 404 | 405 => {
                refused = Some(response.status);
                return Ok(0);
            }
            _ => return Err(RegistryError::status("its repositories", response)),
        }
        let page: Page = parsed(response)?;
        let page = page.repositories.unwrap_or_default();
        count += page.len();
        names.extend(page.into_iter().filter(|name| name.contains(&word)));
        Ok(count)
    })?;
    if let Some(status) = refused {
        return Err(SearchError::NotOffered { registry: domain.to_owned(), status });
    }
    let found = names.into_iter().take(limit).map(|name| Found {
        name: format!("{domain}/{name}"),
        description: String::new(),
        stars: 0,
        official: false,
    });
    Ok(found.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_page_is_found_in_a_link() {
        assert_eq!(
            next_page(r#"</v2/a/tags/list?last=b&n=1>; rel="next""#),
            Some("/v2/a/tags/list?last=b&n=1")
        );
        assert_eq!(next_page(r#"</x>; rel="prev""#), None);
        assert_eq!(next_page("/x"), None);
    }

    #[test]
    fn results_are_read_as_far_as_they_are_ones() {
        let results = serde_json::json!({"results": [
            {"name": "nginx", "description": "a server", "star_count": 3, "is_official": true},
            {"description": "no name"},
            {"name": "other", "star_count": "many"},
            {"name": "beyond"},
        ]});
        let found = found_by_search(&results, "docker.io", 2);
        let names: Vec<_> =
            found.iter().map(|found| (found.name.as_str(), found.stars, found.official)).collect();
        assert_eq!(names, [("nginx", 3, true), ("other", 0, false)]);
        assert_eq!(found_by_search(&serde_json::json!({}), "quay.io", 9), []);
    }
}
