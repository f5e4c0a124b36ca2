//! The part of HTTP/1.1 (RFC 9112) that a scraper needs.
//!
//! A client sends one request without content and gets one answer; then the connection is closed.

use super::text::Format;

/// Bytes that a request may have at most.
pub const MOST: usize = 8 << 10;

/// Header lines that it may have at most.
const HEADERS: usize = 64;

/// What a client asks for.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    pub format: Format,
    /// It wants the answer's head alone.
    pub head_only: bool,
}

/// The request, or the answer to one that is wrong; none if more is to be read.
pub fn read(bytes: &[u8]) -> Option<Result<Request, Vec<u8>>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) if bytes.len() < MOST => return None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Some(Err(refusal("431 Request Header Fields Too Large", "")));
        }
        Err(_) => return Some(Err(refusal("400 Bad Request", ""))),
    }
    let head_only = match request.method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Some(Err(refusal("405 Method Not Allowed", "Allow: GET, HEAD\r\n"))),
    };
    let path = request.path.unwrap_or_default().split('?').next();
    if path != Some("/metrics") {
        return Some(Err(refusal("404 Not Found", "")));
    }
    let accepts =
        request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("accept"));
    let open = accepts.map(|header| String::from_utf8_lossy(header.value).to_ascii_lowercase());
    let open = open.into_iter().any(|value| value.contains("application/openmetrics-text"));
    let format = if open { Format::OpenMetrics } else { Format::Prometheus };
    Some(Ok(Request { format, head_only }))
}

/// The answer with a page.
pub fn answer(request: &Request, page: &str) -> Vec<u8> {
    let mut answer = head("200 OK", request.format.content_type(), page.len(), "");
    if !request.head_only {
        answer.extend_from_slice(page.as_bytes());
    }
    answer
}

fn refusal(status: &str, headers: &str) -> Vec<u8> {
    let text = format!("{status}: the page is GET /metrics\n");
    let mut answer = head(status, "text/plain; charset=utf-8", text.len(), headers);
    answer.extend_from_slice(text.as_bytes());
    answer
}

fn head(status: &str, content_type: &str, len: usize, headers: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len}\r\n\
         Connection: close\r\n{headers}\r\n"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(bytes: &[u8]) -> String {
        let answer = read(bytes).unwrap().unwrap_err();
        let text = String::from_utf8(answer).unwrap();
        text.lines().next().unwrap()["HTTP/1.1 ".len()..].to_owned()
    }

    #[test]
    fn a_request_is_read_when_it_is_all_there() {
        let text =
            b"GET /metrics?a=b HTTP/1.1\r\nHost: h\r\nACCEPT: application/OpenMetrics-text\r\n\r\n";
        for cut in 0..text.len() {
            assert_eq!(read(&text[..cut]), None);
        }
        let wanted = Request { format: Format::OpenMetrics, head_only: false };
        assert_eq!(read(text), Some(Ok(wanted)));
        let wanted = Request { format: Format::Prometheus, head_only: true };
        assert_eq!(read(b"HEAD /metrics HTTP/1.0\r\n\r\n"), Some(Ok(wanted)));
    }

    #[test]
    fn what_is_no_request_for_the_page_is_refused_with_the_status_that_says_why() {
        assert_eq!(refused(b"GET / HTTP/1.1\r\n\r\n"), "404 Not Found");
        assert_eq!(refused(b"POST /metrics HTTP/1.1\r\n\r\n"), "405 Method Not Allowed");
        assert_eq!(refused(b"\x16\x03\x01\x02"), "400 Bad Request");
        assert_eq!(refused(b"GET /metrics HTTP/3.7\r\n\r\n"), "400 Bad Request");
        let long = [b"GET /".as_slice(), &[b'a'; MOST]].concat();
        assert_eq!(refused(&long), "431 Request Header Fields Too Large");
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS + 1));
        assert_eq!(refused(many.as_bytes()), "431 Request Header Fields Too Large");
    }
}
