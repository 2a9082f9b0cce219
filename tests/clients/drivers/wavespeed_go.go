// The Go SDK. Built against a checkout of it, as bin/wavespeed_go of CLIENT_SOURCES: see
// docs/internals/compatibility.md. Its transport refuses whatever would leave this machine.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"

	"github.com/WaveSpeedAI/wavespeed-go/api"
)

type job struct {
	URL, Key, Model, File, Dead string
	Body                        map[string]any
	Only                        string
}

type answer struct {
	Value any    `json:"value,omitempty"`
	Error string `json:"error,omitempty"`
}

// stay keeps every client of http.DefaultTransport on loopback.
func stay() {
	transport := http.DefaultTransport.(*http.Transport)
	dial := transport.DialContext
	transport.Proxy = nil
	transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		host, _, err := net.SplitHostPort(address)
		if ip := net.ParseIP(host); err == nil && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			note(host)
			return nil, fmt.Errorf("%s is not on this machine", host)
		}
		return dial(ctx, network, address)
	}
}

// counted counts what is sent with POST.
type counted struct {
	by    http.RoundTripper
	posts int
}

func (each *counted) RoundTrip(request *http.Request) (*http.Response, error) {
	if request.Method == http.MethodPost {
		each.posts++
	}
	return each.by.RoundTrip(request)
}

func note(host string) {
	log, err := os.OpenFile(os.Getenv("LEFT_LOOPBACK"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	must(err)
	defer log.Close()
	_, err = fmt.Fprintf(log, "connect %s\n", host)
	must(err)
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	stay()
	sent := &counted{by: http.DefaultTransport}
	http.DefaultTransport = sent
	var asked job
	given, err := os.ReadFile(os.Args[1])
	must(err)
	must(json.Unmarshal(given, &asked))

	client := api.NewClient(api.WithAPIKey(asked.Key), api.WithBaseURL(asked.URL))
	stranger := api.NewClient(api.WithAPIKey("frs_not-a-key"), api.WithBaseURL(asked.URL))
	run := func(by *api.Client, changes map[string]any, options ...api.RunOption) (any, error) {
		body := map[string]any{}
		for name, value := range asked.Body {
			body[name] = value
		}
		for name, value := range changes {
			body[name] = value
		}
		done, err := by.Run(asked.Model, body, append(options, api.WithPollInterval(0.1))...)
		if err != nil {
			return nil, err
		}
		return done["outputs"], nil
	}
	cases := map[string]func() (any, error){
		"run":  func() (any, error) { return run(client, nil) },
		"sync": func() (any, error) { return run(client, nil, api.WithSyncMode(true)) },
		"upload": func() (any, error) {
			url, err := client.Upload(asked.File)
			if err != nil {
				return nil, err
			}
			return run(client, map[string]any{"image": url})
		},
		"no throw": func() (any, error) {
			done := client.RunNoThrow(asked.Model, asked.Body, api.WithPollInterval(0.1))
			if done.Detail.Error != "" {
				return nil, fmt.Errorf("%s", done.Detail.Error)
			}
			return done.Outputs, nil
		},
		"bad key":       func() (any, error) { return run(stranger, nil) },
		"bad parameter": func() (any, error) { return run(client, map[string]any{"num_images": 5}) },
		"dead URL":      func() (any, error) { return run(client, map[string]any{"image": asked.Dead}) },
	}
	answers := map[string]answer{}
	for name, call := range cases {
		if asked.Only != "" && asked.Only != name {
			continue
		}
		if value, err := call(); err != nil {
			answers[name] = answer{Error: err.Error()}
		} else {
			answers[name] = answer{Value: value}
		}
	}
	answers["posts"] = answer{Value: sent.posts}
	written, err := json.Marshal(answers)
	must(err)
	must(os.WriteFile(os.Args[2], written, 0o600))
}
